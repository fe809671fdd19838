"""Decode attention in C++ for the CPU: one pass over the cache, heads and splits of keys over threads.

See csrc/decode_attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native

C = _native.library()

_NO_INTEGERS = (0, 0)


def refuses(q, k_cache, v_cache, *_args) -> str | None:
    if not 1 <= q.shape[-1] <= 256:
        return f"the head width must be 1 ... 256, got {q.shape[-1]}"
    return _native.refuses_tensors("cpu", q=q, k_cache=k_cache, v_cache=v_cache)


def forward(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, wants_lse: bool):
    batch, heads, queries, width = q.shape
    cache_rows, heads_k, capacity, _ = k_cache.shape
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if wants_lse else None
    floats = C.decode_attention_partial(batch, heads, queries, capacity, width)
    partial = torch.empty(floats, dtype=torch.float32) if floats else None
    C.decode_attention(
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
    return out, lse


def _integers(x: Tensor | None) -> tuple[int, int]:
    """Address, and whether the numbers are int64."""
    return _NO_INTEGERS if x is None else (x.data_ptr(), x.dtype == torch.int64)
