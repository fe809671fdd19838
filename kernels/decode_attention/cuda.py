"""Decode attention in CUDA C++, for tensors on a GPU; see csrc/decode_attention."""

from __future__ import annotations

import torch

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.decode_attention import native
from fused_transformer.kernels.decode_attention.splits import split_keys

_C = _cuda.library()


def refuses(q, k_cache, v_cache, *_args) -> str | None:
    return native.refuses_width(q) or _cuda.refuses_tensors(q=q, k_cache=k_cache, v_cache=v_cache)


def forward(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, wants_lse: bool):
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if wants_lse else None
    capacity, width = k_cache.shape[2], q.shape[-1]
    keys = split_keys(capacity)
    splits = -(-capacity // keys)
    partial = q.new_empty((*q.shape[:3], splits, width + 2), dtype=torch.float32) if splits > 1 else None
    with _cuda.current(q):
        launch = _cuda.on_current_stream(_C.decode_attention_cuda, q)
        launch(*native.arguments(q, k_cache, v_cache, lengths, rows, causal, scale, out, lse, partial), keys)
    return out, lse
