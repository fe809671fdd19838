"""Attention in C++ for the CPU: flash-style tiles, SIMD, OpenMP over heads and tiles. See csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._checks import empty_rows_like
from fused_transformer.kernels.attention import native
from fused_transformer.kernels.attention.mask import Mask
from fused_transformer.kernels.memory import empty_result

C = _native.library()


def refuses(q, k, v, mask: Mask, scale, dropout_p, seed) -> str | None:
    why = native.refuses_width(q)
    if why is not None:
        return why
    if q.is_cpu and k.is_cpu and v.is_cpu and q.dtype == k.dtype == v.dtype in _native.DTYPES and mask.bias is None:
        return None
    return _native.refuses_tensors("cpu", q=q, k=k, v=v, bias=mask.bias)


def forward(q, k, v, mask: Mask, scale, dropout_p, seed):
    out, lse = empty_rows_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if mask.packed and int(mask.q_offsets[-1]) < q.shape[0]:  # tokens of no sequence
        out.zero_()
        lse.fill_(-torch.inf)
    if mask.k_length == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    scratch = _scratch("forward", q)
    problem = native.problem(q, k, v, mask, scale, dropout_p, seed)
    C.attention_forward(problem, native.rows(out), native.statistics(lse), scratch.data_ptr())
    return out, lse


def backward(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    # The kernel writes the rows of all sequences, but not packed tokens that belong to none.
    complete = mask.q_length > 0 and mask.k_length > 0 and not mask.packed
    dq = empty_rows_like(q) if complete else empty_rows_like(q).zero_()
    dk, dv = (_padded(x) if complete else _padded(x).zero_() for x in (k, v))
    dbias = mask.bias.new_zeros(mask.bias.shape, dtype=torch.float32) if wants_dbias else None
    if mask.k_length > 0:
        scratch = _scratch("backward", q)
        problem = native.problem(q, k, v, mask, scale, dropout_p, seed)
        saved, gradients = (
            (native.rows(out), native.rows(dout), native.statistics(lse)),
            (native.rows(dq), native.rows(dk), native.rows(dv)),
        )
        C.attention_backward(problem, saved, gradients, native.scores(dbias), scratch.data_ptr())
    dk, dv = (d[..., : q.shape[-1]].to(q.dtype) for d in (dk, dv))
    return dq, dk, dv, None if dbias is None else dbias.to(mask.bias.dtype)


def weights(q, k, lse, mask: Mask, scale, dropout_p, seed):
    probabilities = empty_result(*q.shape[:3], mask.k_length, like=q)
    scratch = _scratch("weights", q)
    problem = native.problem(q, k, k, mask, scale, dropout_p, seed)
    C.attention_weights(problem, native.statistics(lse), probabilities.data_ptr(), scratch.data_ptr())
    return probabilities


def _padded(k: Tensor) -> Tensor:
    """float32 memory in k's shape and order, its last axis rounded up to whole vectors."""
    width = -(-k.shape[-1] // 16) * 16
    if width == k.shape[-1]:
        return empty_rows_like(k, torch.float32)
    return k.new_empty((*k.shape[:-1], width), dtype=torch.float32)


def _scratch(direction: str, q: Tensor) -> Tensor:
    return q.new_empty(C.attention_scratch(direction, q.shape[-1]), dtype=torch.float32)
