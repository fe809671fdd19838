"""Decode attention in C++ for the CPU: one pass over the cache, heads and splits of keys over threads.

See csrc/decode_attention.
"""

from __future__ import annotations

import torch

from fused_transformer.kernels import _native
from fused_transformer.kernels.decode_attention import native

C = _native.library()


def refuses(q, k_cache, v_cache, *_args) -> str | None:
    return native.refuses_width(q) or _native.refuses_tensors("cpu", q=q, k_cache=k_cache, v_cache=v_cache)


def forward(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, wants_lse: bool):
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if wants_lse else None
    batch, heads, queries, width = q.shape
    floats = C.decode_attention_partial(batch, heads, queries, k_cache.shape[2], width)
    partial = q.new_empty(floats, dtype=torch.float32) if floats else None
    C.decode_attention(*native.arguments(q, k_cache, v_cache, lengths, rows, causal, scale, out, lse, partial))
    return out, lse
