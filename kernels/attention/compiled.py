"""Attention as operators of torch; see kernels/_compile.py.

The operators take the masks as `attention` does and make a Mask of them where numbers can be looked at: lengths and
offsets are checked, and the longest sequence of a packed batch is found, when the node runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_transformer.kernels._autocast import lowered
from fused_transformer.kernels._checks import dense_last, require_dropout
from fused_transformer.kernels._compile import absent, laid_out_like, operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import new_seed
from fused_transformer.kernels.attention import reference
from fused_transformer.kernels.attention.checks import check_statistics, check_tensors
from fused_transformer.kernels.attention.mask import make_mask

# What follows the tensors of each operator. causal is "" for False; a window of -1 has no limit.
_OPTIONS = (
    "Tensor? keep, Tensor? bias, str causal, SymInt left, SymInt right, Tensor? k_lengths, Tensor? q_offsets, "
    "Tensor? k_offsets, float? scale, float dropout_p, Tensor? seed"
)


def attention(q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed):
    """`attention_with_lse` as one node."""
    q, k, v = lowered(q, k, v)
    masks = _masks(keep, bias, causal, window, k_lengths, q_offsets, k_offsets)
    if dropout_p > 0.0 and seed is None:
        seed = new_seed(q.device)
    return _attention(q, k, v, *masks, scale, dropout_p, seed)


def attention_weights(q, k, lse, keep, bias, causal, window, k_lengths, scale, dropout_p, seed):
    """`attention_weights` as one node."""
    q, k = lowered(q, k)
    masks = _masks(keep, bias, causal, window, k_lengths, None, None)
    return _attention_weights(q, k, lse, *masks, scale, dropout_p, seed)


def _masks(keep, bias, causal, window, k_lengths, q_offsets, k_offsets) -> tuple:
    left, right = (-1, -1) if window is None else window
    return keep, bias, causal or "", left, right, k_lengths, q_offsets, k_offsets


def _checked(q, k, v, keep, bias, causal, left, right, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed):
    """What a backend takes: (q, k, v, mask, scale, dropout_p, seed)."""
    q, k, v = check_tensors(q, k, v, packed=q_offsets is not None)
    mask = make_mask(
        q,
        k,
        keep=keep,
        bias=bias,
        causal=causal or False,
        window=(left, right),
        k_lengths=k_lengths,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
    )
    require_dropout(dropout_p, seed, q.device)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    return q, k, v, mask, scale, dropout_p, seed


# ---------------------------------------------------------------- out and lse


def _forward(*arguments):
    q, *rest = _checked(*arguments)
    out, lse = OPS["attention"].pick(q, *rest).forward(q, *rest)
    return laid_out_like(q, out), lse.contiguous()


def _forward_fake(*arguments):
    q, *_ = _checked(*arguments)
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=_statistics(q))


def _forward_plain(*arguments):
    checked = _checked(*arguments)
    if checked[3].packed:
        raise NotImplementedError("packed batches can't be exported to ONNX: pass padded tensors and k_lengths")
    return reference.forward(*checked)


def _forward_flops(q, k, v, keep, bias, causal, left, right, k_lengths, q_offsets, *_, **__):
    return 2 * _scores(q, k, q_offsets)


def _save(ctx, inputs, output):
    q, k, v, keep, bias, causal, left, right, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, keep, bias, k_lengths, q_offsets, k_offsets, seed)
    ctx.rest = causal, left, right, scale, dropout_p
    ctx.mark_non_differentiable(lse)


def _gradients(ctx, dout, _dlse):
    q, k, v, out, lse, keep, bias, k_lengths, q_offsets, k_offsets, seed = ctx.saved_tensors
    causal, left, right, scale, dropout_p = ctx.rest
    wants_dbias = bias is not None and ctx.needs_input_grad[4]
    masks = (keep, bias, causal, left, right, k_lengths, q_offsets, k_offsets)
    dq, dk, dv, dbias = _call_backward(dout, q, k, v, out, lse, *masks, scale, dropout_p, seed, wants_dbias)
    return dq, dk, dv, None, dbias if wants_dbias else None, *(None,) * 9


# ---------------------------------------------------------------- their gradient


def _backward(dout, q, k, v, out, lse, *rest):
    *rest, wants_dbias = rest
    q, k, v, *given = _checked(q, k, v, *rest)
    backend = OPS["attention"].pick(q, k, v, *given)
    dq, dk, dv, dbias = backend.backward(dense_last(dout), q, k, v, out, lse, *given, wants_dbias)
    bias = rest[1]
    dbias = dbias.reshape(bias.shape).contiguous() if wants_dbias else absent(q)
    return laid_out_like(q, dq), laid_out_like(k, dk), laid_out_like(v, dv), dbias


def _backward_fake(dout, q, k, v, out, lse, *rest):
    bias, wants_dbias = rest[1], rest[-1]
    dbias = bias.new_empty(bias.shape) if wants_dbias else absent(q)
    return *(torch.empty_like(dense_last(x)) for x in (q, k, v)), dbias


def _backward_flops(dout, q, k, v, out, lse, keep, bias, causal, left, right, k_lengths, q_offsets, *_, **__):
    return 5 * _scores(q, k, q_offsets)  # the scores again, and the products that give dV, dP, dQ and dK


_call_backward = operator(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool wants_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    run=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)
_attention = operator(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    run=_forward,
    fake=_forward_fake,
    save=_save,
    backward=_gradients,
    flops=_forward_flops,
    plain=_forward_plain,
)


# ---------------------------------------------------------------- the weights


def _weights(q, k, lse, *rest):
    q, k, _, *given = _checked_weights(q, k, lse, *rest)
    backend = OPS["attention"].pick(q, k, k, *given)
    return backend.weights(q, k, lse.contiguous(), *given).contiguous()


def _weights_fake(q, k, lse, *rest):
    _checked_weights(q, k, lse, *rest)
    return q.new_empty((*q.shape[:3], k.shape[2]))


def _weights_plain(q, k, lse, *rest):
    q, k, _, *given = _checked_weights(q, k, lse, *rest)
    return reference.weights(q, k, lse, *given)


def _checked_weights(q, k, lse, *rest):
    checked = _checked(q, k, k, *rest)
    check_statistics(q, lse, *checked[-2:])
    return checked


def _weights_flops(q, k, *_, **__):
    return _scores(q, k, None)


def _save_weights(ctx, inputs, output):
    q, k, lse, keep, bias, causal, left, right, k_lengths, _, _, scale, dropout_p, seed = inputs
    ctx.save_for_backward(q, k, lse, keep, bias, k_lengths, seed)
    ctx.rest = causal, left, right, scale, dropout_p


def _weights_gradients(ctx, dweights):
    q, k, lse, keep, bias, k_lengths, seed = ctx.saved_tensors
    causal, left, right, scale, dropout_p = ctx.rest
    wants_dbias = bias is not None and ctx.needs_input_grad[4]
    masks = (keep, bias, causal, left, right, k_lengths, None, None)
    dq, dk, dbias = _call_weights_backward(dweights, q, k, lse, *masks, scale, dropout_p, seed, wants_dbias)
    return dq, dk, None, None, dbias if wants_dbias else None, *(None,) * 9


def _weights_backward(dweights, q, k, lse, *rest):
    *rest, wants_dbias = rest
    q, k, _, *given = _checked(q, k, k, *rest)
    dq, dk, dbias = reference.weights_backward(dweights, q, k, lse, *given, wants_dbias)
    bias = rest[1]
    dbias = dbias.reshape(bias.shape).contiguous() if wants_dbias else absent(q)
    return laid_out_like(q, dq), laid_out_like(k, dk), dbias


def _weights_backward_fake(dweights, q, k, lse, *rest):
    bias, wants_dbias = rest[1], rest[-1]
    dbias = bias.new_empty(bias.shape) if wants_dbias else absent(q)
    return torch.empty_like(dense_last(q)), torch.empty_like(dense_last(k)), dbias


def _weights_backward_flops(dweights, q, k, *_, **__):
    return 3 * _scores(q, k, None)  # the scores again, dQ and dK


_call_weights_backward = operator(
    f"attention_weights_backward(Tensor dweights, Tensor q, Tensor k, Tensor lse, {_OPTIONS}, bool wants_dbias) "
    "-> (Tensor dq, Tensor dk, Tensor dbias)",
    run=_weights_backward,
    fake=_weights_backward_fake,
    flops=_weights_backward_flops,
)
_attention_weights = operator(
    f"attention_weights(Tensor q, Tensor k, Tensor lse, {_OPTIONS}) -> Tensor",
    run=_weights,
    fake=_weights_fake,
    save=_save_weights,
    backward=_weights_gradients,
    flops=_weights_flops,
    plain=_weights_plain,
)


# ---------------------------------------------------------------- pieces


def _statistics(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _scores(q: tuple, k: tuple, q_offsets: tuple | None) -> int:
    """Operations of one product of q's shape and k's: masks are not looked at, as torch's formulas don't.

    Of a packed batch the lengths are not known: B sequences of average length are counted.
    """
    if q_offsets is None:
        batch, heads, length, width = q
        return 2 * batch * heads * length * k[2] * width
    tokens, heads, width = q
    return 2 * heads * width * tokens * k[0] // max(q_offsets[0] - 1, 1)
