"""Attention written from the paper in plain torch: the meaning every other backend is tested against.

Materialises the (L, S) matrix, one sequence after another if the batch is packed. Any device, any float dtype.
Arithmetic is in the dtype of the inputs (statistics in float32, or float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _philox
from fused_transformer.kernels._checks import has_numbers
from fused_transformer.kernels.attention.mask import Mask

# Letters in einsums: b batch, h heads, l queries, s keys, d head width.


def refuses(*_args) -> None:
    return None


def forward(q, k, v, mask: Mask, scale, dropout_p, seed):
    if mask.packed:
        return _forward_packed(q, k, v, mask, scale, dropout_p, seed)
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    allowed = _allowed(q, mask)
    scores = _scores(q, k, mask.bias, allowed, scale)
    lse = torch.logsumexp(scores.to(_statistics_dtype(q)), dim=-1)
    weights = _probabilities(scores, lse)
    if dropout_p > 0.0:
        weights = weights * _dropout_factor(weights, dropout_p, seed)
    return _weighted_sum(weights, v, scores > -torch.inf), lse


def backward(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    if mask.packed:
        return _backward_packed(dout, q, k, v, out, lse, mask, scale, dropout_p, seed, wants_dbias)
    heads_k = k.shape[1]
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    allowed = _allowed(q, mask)
    scores = _scores(q, k, mask.bias, allowed, scale)
    allowed = scores > -torch.inf
    weights = _probabilities(scores, torch.logsumexp(scores.to(_statistics_dtype(q)), dim=-1))
    factor = _dropout_factor(weights, dropout_p, seed) if dropout_p > 0.0 else torch.ones_like(weights)
    alive = allowed.any(-1, keepdim=True)  # rows with nothing to attend to give no gradient, whatever they hold
    dout, q = torch.where(alive, dout, 0), torch.where(alive, q, 0)

    dv = torch.einsum("bhls,bhld->bhsd", weights * factor, dout)
    dweights = torch.einsum("bhld,bhsd->bhls", dout, v) * factor
    # Σ_s weights · dweights = dout · out: the saved output spares the sum over keys (and rounds as out was rounded)
    delta = (dout * torch.where(alive, out, 0)).sum(-1, keepdim=True)
    dscores = torch.where(allowed, weights * (dweights - delta), 0)
    dq = scale * _weighted_sum(dscores, k, allowed)
    dk = scale * torch.einsum("bhls,bhld->bhsd", dscores, q)
    dbias = _sum_to(dscores, mask.bias) if wants_dbias else None
    return dq, _sum_heads(dk, heads_k), _sum_heads(dv, heads_k), dbias


def weights(q, k, lse, mask: Mask, scale, dropout_p, seed):
    scores = _scores(q, _repeat_heads(q, k), mask.bias, _allowed(q, mask), scale)
    probabilities = _probabilities(scores, lse)
    if dropout_p > 0.0:
        probabilities = probabilities * _dropout_factor(probabilities, dropout_p, seed)
    return probabilities


def weights_backward(dweights, q, k, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    """Gradients of `weights` as a function of q, k and bias (lse moves with them)."""
    heads_k = k.shape[1]
    k = _repeat_heads(q, k)
    scores = _scores(q, k, mask.bias, _allowed(q, mask), scale)
    allowed = scores > -torch.inf
    # Not with the lse given: it may be another backend's, rounded otherwise, and where there is one key alone the
    # gradient is exactly 0 only if its weight is exactly 1.
    probabilities = _probabilities(scores, torch.logsumexp(scores.to(_statistics_dtype(q)), -1))
    if dropout_p > 0.0:
        dweights = dweights * _dropout_factor(probabilities, dropout_p, seed)
    product = torch.where(allowed, probabilities * dweights, 0)
    dscores = product - probabilities * product.sum(-1, keepdim=True)
    q = torch.where(allowed.any(-1, keepdim=True), q, 0)
    dq = scale * _weighted_sum(dscores, k, allowed)
    dk = scale * torch.einsum("bhls,bhld->bhsd", dscores, q)
    return dq, _sum_heads(dk, heads_k), _sum_to(dscores, mask.bias) if wants_dbias else None


# ---------------------------------------------------------------- pieces


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _allowed(q: Tensor, mask: Mask) -> Tensor:
    """(B or 1, H or 1, L, S) bool: every mask form but the bias, combined."""
    device, (length, keys) = q.device, (mask.q_length, mask.k_length)
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    n = torch.full((1, 1, 1, 1), keys, device=device)
    if mask.k_lengths is not None:
        n = mask.k_lengths[:, None, None, None]
    allowed = (j < n).expand(-1, -1, length, -1)
    shifted = i + (n - length) if mask.causal == "bottom_right" else i
    if mask.causal:
        allowed = allowed & (j <= shifted)
    left, right = mask.window
    if left >= 0:
        allowed = allowed & (j >= shifted - left)
    if right >= 0:
        allowed = allowed & (j <= shifted + right)
    if mask.keep is not None:
        allowed = allowed & mask.keep
    return allowed


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, allowed: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ + bias, and -inf where masked (by selection: a NaN in a masked key is gone)."""
    scores = torch.einsum("bhld,bhsd->bhls", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
        allowed = allowed & (bias > -torch.inf)
    return torch.where(allowed, scores, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    shift = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
    return torch.exp(scores.to(shift.dtype) - shift).to(scores.dtype)


def _weighted_sum(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Σ_s weights · values over the allowed keys alone: 0 · NaN must not happen for the masked ones."""
    finite = values.isfinite()
    out = torch.einsum("bhls,bhsd->bhld", weights, torch.where(finite, values, 0))
    if not has_numbers(values) or finite.all():  # in a trace (for ONNX) nobody can look: NaN and Inf count as 0 there
        return out
    for bad in (torch.nan, torch.inf, -torch.inf):
        is_bad = values.isnan() if bad != bad else values == bad
        reached = torch.einsum("bhls,bhsd->bhld", allowed.to(values.dtype).expand_as(weights), is_bad.to(values.dtype))
        out = torch.where(reached > 0, out + bad, out)
    return out


def _dropout_factor(like: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """0 or 1 / (1 - p) for each element of a (B, H, L, S) tensor."""
    b, h, length, keys = like.shape
    outer = torch.arange(b * h, device=like.device).view(b, h, 1, 1)
    row = torch.arange(length, device=like.device).view(1, 1, length, 1)
    col = torch.arange(keys, device=like.device).view(1, 1, 1, keys)
    keep = _philox.keep_mask(seed, dropout_p, outer, row, col)
    return keep.to(like.dtype) * _philox.keep_scale(dropout_p)


def _repeat_heads(q: Tensor, k: Tensor) -> Tensor:
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _sum_heads(dk: Tensor, heads_k: int) -> Tensor:
    return dk if dk.shape[1] == heads_k else dk.unflatten(1, (heads_k, -1)).sum(2)


def _sum_to(full: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a broadcast bias: summed over each axis where the bias has size 1."""
    axes = [axis for axis in range(4) if bias.shape[axis] == 1 and full.shape[axis] != 1]
    total = full.sum(axes, keepdim=True) if axes else full
    if total.shape != bias.shape:  # a packed batch's bias may be longer than its longest sequence
        padded = total.new_zeros(bias.shape)
        padded[:, :, : total.shape[2], : total.shape[3]] = total
        total = padded
    return total.to(bias.dtype)


# ---------------------------------------------------------------- packed batches


def _pad(x: Tensor, offsets: Tensor, length: int) -> Tensor:
    """(T, H, D) -> (B, H, length, D), zero beyond each sequence."""
    out = x.new_zeros(len(offsets) - 1, x.shape[1], length, *x.shape[2:])
    for b, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        out[b, :, : stop - start] = x[start:stop].transpose(0, 1)
    return out


def _unpad(x: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    out = x.new_zeros(tokens, x.shape[1], *x.shape[3:])
    for b, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        out[start:stop] = x[b, :, : stop - start].transpose(0, 1)
    return out


def _as_padded(mask: Mask) -> tuple[Mask, Tensor, Tensor, Tensor]:
    """The mask of the padded twin of a packed batch: the sequences' own lengths, causal as a keep mask."""
    q_lengths, k_lengths = mask.q_offsets.diff(), mask.k_offsets.diff()
    if mask.k_lengths is not None:
        k_lengths = torch.minimum(k_lengths, mask.k_lengths)
    device = q_lengths.device
    i = torch.arange(mask.q_length, device=device)[None, None, :, None]
    j = torch.arange(mask.k_length, device=device)[None, None, None, :]
    shift = (k_lengths - q_lengths)[:, None, None, None] if mask.causal == "bottom_right" else 0
    keep = (i < q_lengths[:, None, None, None]) & (j >= 0)
    left, right = mask.window
    if mask.causal:
        keep = keep & (j <= i + shift)
    if left >= 0:
        keep = keep & (j >= i + shift - left)
    if right >= 0:
        keep = keep & (j <= i + shift + right)
    if mask.keep is not None:
        keep = keep & mask.keep[:, :, : mask.q_length, : mask.k_length]
    bias = None if mask.bias is None else mask.bias[:, :, : mask.q_length, : mask.k_length]
    sizes = (mask.batch, mask.q_length, mask.k_length)
    return Mask(*sizes, keep, bias, False, (-1, -1), k_lengths, None, None), mask.q_offsets, mask.k_offsets, mask.bias


def _forward_packed(q, k, v, mask: Mask, scale, dropout_p, seed):
    padded, q_offsets, k_offsets, _ = _as_padded(mask)
    k_pad, v_pad = _pad(k, k_offsets, mask.k_length), _pad(v, k_offsets, mask.k_length)
    out, lse = forward(_pad(q, q_offsets, mask.q_length), k_pad, v_pad, padded, scale, dropout_p, seed)
    lse_packed = _unpad(lse[..., None], q_offsets, q.shape[0])[..., 0]
    lse_packed[int(q_offsets[-1]) :] = -torch.inf  # tokens beyond the last sequence
    return _unpad(out, q_offsets, q.shape[0]), lse_packed


def _backward_packed(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    padded, q_offsets, k_offsets, bias = _as_padded(mask)
    q_pad, dout_pad, out_pad = (_pad(x, q_offsets, mask.q_length) for x in (q, dout, out))
    k_pad, v_pad = (_pad(x, k_offsets, mask.k_length) for x in (k, v))
    dq, dk, dv, dbias = backward(
        dout_pad, q_pad, k_pad, v_pad, out_pad, None, padded, scale, dropout_p, seed, wants_dbias
    )
    if wants_dbias and dbias.shape != bias.shape:
        full = bias.new_zeros(bias.shape)
        full[:, :, : dbias.shape[2], : dbias.shape[3]] = dbias
        dbias = full
    return (
        _unpad(dq, q_offsets, q.shape[0]),
        _unpad(dk, k_offsets, k.shape[0]),
        _unpad(dv, k_offsets, v.shape[0]),
        dbias,
    )
