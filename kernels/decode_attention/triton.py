"""Decode attention in Triton: keys split over programs, and the parts merged by a second kernel.

A program has the queries of one key head (of all query heads that share it, and all L) and one split of its keys; it
reads each key and value once. The time is the cache's: 2 · length · D · s bytes a key head, of s bytes an element. With
few sequences the splits are what makes programs enough for the whole GPU.

The split is chosen by the capacity alone, so a sequence's bits do not depend on the batch; splits beyond a sequence's
length return at once. A cache of one split is written by the first kernel, without partial results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from fused_transformer.kernels import _triton
from fused_transformer.kernels.decode_attention.splits import split_keys
from fused_transformer.kernels.decode_attention.triton_kernels import (
    decode_attention_merge_kernel,
    decode_attention_row_kernel,
    decode_attention_rows_kernel,
)

MERGED_AT_ONCE = 8  # splits that the merge reads side by side


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows and keys of a program's tile, columns of a product at once, warps, and blocks of keys under way."""

    m: int
    n: int
    columns: int
    warps: int
    stages: int


def tile(rows: int, width: int, dtype: torch.dtype) -> Tile:
    """For `rows` queries that share a key head; `width` is the head's, rounded up to a power of two."""
    if rows == 1:
        # Keys, values and float32 sums in registers: 4096 elements are 32 a thread of each, 16 KB (16-bit types) to
        # 32 KB of loads under way a program, and three or four programs run on a multiprocessor.
        return Tile(1, min(128, 4096 // width), width, 4, 1)
    if dtype == torch.float32:
        # Products on the plain float units keep every column of their operands in registers: 32 columns at a time, and
        # never more than 16 rows (the least that tl.dot takes).
        return Tile(16, 32 if width <= 128 else 16, min(width, 32), 4 if width <= 64 else 8, 2)
    # Keys and values under way take up to 64 KB of shared memory, so that two programs fit on a multiprocessor.
    n, stages = 64 if width <= 128 else 32, 3 if width <= 64 else 2
    if rows <= 16:
        return Tile(16, n, width, 4, stages)
    return Tile(32, n, width, 4 if width <= 64 else 8, stages)


def refuses(q, k_cache, v_cache, *_args) -> str | None:
    if not 1 <= q.shape[-1] <= 256:
        return f"the head width must be 1 ... 256, got {q.shape[-1]}"
    return _triton.refuses_tensors(q=q, k_cache=k_cache, v_cache=v_cache)


def forward(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, wants_lse: bool):
    batch, heads, queries, width = q.shape
    cache_rows, heads_k, capacity, _ = k_cache.shape
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if wants_lse else None
    if out.numel() == 0:
        return out, lse
    group, keys = heads // heads_k, split_keys(capacity)
    splits = max(1, triton.cdiv(capacity, keys))
    # With one split these hold nothing, but are there: without them a kernel would be another one.
    parts = (*q.shape[:3], splits if splits > 1 else 0)
    partial = q.new_empty((*parts, width), dtype=torch.float32)
    statistics = q.new_empty((*parts, 2), dtype=torch.float32)  # maximum and sum

    block_d = max(16, triton.next_power_of_2(width))
    chosen = tile(group * queries, block_d, q.dtype)
    tensors = (q, k_cache, v_cache, lengths, rows, out, lse, partial, statistics)
    stride_rows_b = 0 if rows is None else rows.stride(0)
    common = {"TABLE": rows is not None and rows.dim() == 2, "D": width, "BLOCK_N": chosen.n, "BLOCK_D": block_d}
    common |= {"num_warps": chosen.warps, "num_stages": chosen.stages}
    with _triton.current(q):
        if chosen.m == 1:
            decode_attention_row_kernel[batch * heads_k, splits](
                *tensors,
                *(heads_k, capacity, cache_rows, keys, splits),
                *(*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2], stride_rows_b),
                scale,
                **common,
            )
        else:
            tiles = triton.cdiv(group * queries, chosen.m)
            decode_attention_rows_kernel[batch * heads_k * tiles, splits](
                *tensors,
                *(heads_k, group, queries, capacity, cache_rows, keys, splits),
                *(*q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:3], stride_rows_b),
                scale,
                RAGGED=causal and queries > 1,
                PRECISION=_triton.dot_precision(),
                BLOCK_M=chosen.m,
                BLOCK_C=chosen.columns,
                **common,
            )
        if splits > 1:
            decode_attention_merge_kernel[(batch * heads * queries,)](
                *(partial, statistics, lengths, out, lse),
                *(heads, queries, capacity, keys, splits),
                *out.stride()[:3],
                D=width,
                BLOCK_S=MERGED_AT_ONCE,
                BLOCK_D=block_d,
                num_warps=4,
            )
    return out, lse
