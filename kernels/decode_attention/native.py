"""How the native backends of decode attention pass their arguments: addresses, sizes and strides (bind.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native


def refuses_width(q: Tensor) -> str | None:
    """Why the native kernels do not take heads as wide as q's, or None."""
    return None if 1 <= q.shape[-1] <= 256 else f"the head width must be 1 ... 256, got {q.shape[-1]}"


def arguments(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, out, lse, partial) -> tuple:
    """The fields of DecodeAttention (csrc/decode_attention/decode_attention.h), in groups."""
    batch, heads, queries, width = q.shape
    cache_rows, heads_k, capacity, _ = k_cache.shape
    return (
        (batch, heads, heads_k, queries, width, cache_rows, capacity),
        _native.DTYPES[q.dtype],
        [(x.data_ptr(), *x.stride()[:3]) for x in (q, k_cache, v_cache, out)],
        _integers(lengths),
        _integers(rows),
        (0, 0) if rows is None else (rows.stride(0), rows.stride(1) if rows.dim() == 2 else 0),
        scale,
        causal,
        _native.ptr(lse),
        _native.ptr(partial),
    )


def _integers(x: Tensor | None) -> tuple[int, int]:
    """Address, and whether the numbers are int64."""
    return (0, 0) if x is None else (x.data_ptr(), x.dtype == torch.int64)
