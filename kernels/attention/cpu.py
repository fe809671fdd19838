"""Attention in C++ for the CPU: flash-style tiles, SIMD, OpenMP over heads and tiles. See csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native, _philox
from fused_transformer.kernels.attention.mask import Mask

C = _native.library()

_CAUSAL = {False: 0, "top_left": 1, "bottom_right": 2}
_NO_SCORES = (0, 0, 0, 0, 0)


def refuses(q, k, v, mask: Mask, scale, dropout_p, seed) -> str | None:
    if q.shape[-1] > 256 or q.shape[-1] < 1:
        return f"the head width must be 1 ... 256, got {q.shape[-1]}"
    return _native.refuses_tensors("cpu", q=q, k=k, v=v, bias=mask.bias)


def forward(q, k, v, mask: Mask, scale, dropout_p, seed):
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32)
    if mask.packed and int(mask.q_offsets[-1]) < q.shape[0]:  # tokens of no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    if mask.k_length == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    scratch = _scratch("forward", q)
    problem = _problem(q, k, v, mask, scale, dropout_p, seed)
    C.attention_forward(problem, _rows(out), _rows(lse[..., None]), scratch.data_ptr())
    return out, lse


def backward(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    # The kernel writes the rows of all sequences, but not packed tokens that belong to none.
    complete = mask.q_length > 0 and mask.k_length > 0 and not mask.packed
    dq = torch.empty_like(q) if complete else torch.zeros_like(q)
    dk, dv = (_padded(x) if complete else _padded(x).zero_() for x in (k, v))
    dbias = torch.zeros(mask.bias.shape, dtype=torch.float32) if wants_dbias else None
    if mask.k_length > 0:
        scratch = _scratch("backward", q)
        problem = _problem(q, k, v, mask, scale, dropout_p, seed)
        saved, gradients = (_rows(out), _rows(dout), _rows(lse[..., None])), (_rows(dq), _rows(dk), _rows(dv))
        C.attention_backward(problem, saved, gradients, _scores(dbias), scratch.data_ptr())
    dk, dv = (d[..., : q.shape[-1]].to(q.dtype) for d in (dk, dv))
    return dq, dk, dv, None if dbias is None else dbias.to(mask.bias.dtype)


def weights(q, k, lse, mask: Mask, scale, dropout_p, seed):
    probabilities = torch.empty((*q.shape[:3], mask.k_length), dtype=q.dtype)
    scratch = _scratch("weights", q)
    problem = _problem(q, k, k, mask, scale, dropout_p, seed)
    C.attention_weights(problem, _rows(lse[..., None]), probabilities.data_ptr(), scratch.data_ptr())
    return probabilities


def _problem(q, k, v, mask: Mask, scale, dropout_p, seed) -> tuple:
    """The arguments that all directions share, in the order of `fill` in csrc/attention/bind.cpp."""
    heads_axis = 1
    sizes = (mask.batch, q.shape[heads_axis], k.shape[heads_axis], mask.q_length, mask.k_length, q.shape[-1])
    return (
        sizes,
        _native.DTYPES[q.dtype],
        _rows(q),
        _rows(k),
        _rows(v),
        scale,
        _scores(mask.keep),
        _scores(mask.bias),
        0 if mask.bias is None else _native.DTYPES[mask.bias.dtype],
        _CAUSAL[mask.causal],
        mask.window,
        (_native.ptr(mask.k_lengths), _native.ptr(mask.q_offsets), _native.ptr(mask.k_offsets)),
        dropout_p,
        _philox.threshold(dropout_p),
        _philox.keep_scale(dropout_p),
        _native.ptr(seed) if dropout_p > 0.0 else 0,
    )


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides (batch, head, row); packed tensors (T, H, ...) have no batch axis.

    The statistics (B, H, L) and (T, H) are given as rows without a last axis.
    """
    if x.dim() == 4:
        batch, head, row, _ = x.stride()
        return x.data_ptr(), batch, head, row
    row, head, _ = x.stride()
    return x.data_ptr(), 0, head, row


def _scores(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """Address and strides of a 4-D mask, 0 along the axes that it broadcasts."""
    if x is None:
        return _NO_SCORES
    return (x.data_ptr(), *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))


def _padded(k: Tensor) -> Tensor:
    """float32 memory in k's shape and order, its last axis rounded up to whole vectors."""
    width = -(-k.shape[-1] // 16) * 16
    if width == k.shape[-1]:
        return torch.empty_like(k, dtype=torch.float32)
    return torch.empty((*k.shape[:-1], width), dtype=torch.float32)


def _scratch(direction: str, q: Tensor) -> Tensor:
    return torch.empty(C.attention_scratch(direction, q.shape[-1]), dtype=torch.float32)
