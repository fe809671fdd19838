"""Attention's weights in Triton: exp(S - lse), tile by tile, from the forward pass's lse. Bound by writing them."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from fused_transformer.kernels.attention.triton_tiles import (
    INF,
    exponential,
    head_of,
    load_numbers,
    load_tile,
    masked,
    matrix,
    numbers,
    seen,
    shift_of,
)


@triton.jit(do_not_specialize=["H", "tiles_m", "tiles_n"])
def attention_weights_kernel(q, k, mask, dropout, lse_ptr, weights_ptr, H, tiles_m, tiles_n, scale, blocks):
    """Grid (tiles of keys · tiles of queries · B · H,). weights: (B, H, L, S) contiguous; masked ones are 0."""
    pid = tl.program_id(0)
    col = pid % tiles_n * blocks.N
    row = pid // tiles_n % tiles_m * blocks.M
    outer = pid // tiles_n // tiles_m
    batch = (outer // H).to(tl.int64)
    h = (outer % H).to(tl.int64)
    head = head_of(mask, batch, h, H)
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    rows = row + offs_m
    cols = col + offs_n
    weight = tl.zeros([blocks.M, blocks.N], dtype=tl.float32)
    last = tl.minimum(row + blocks.M, head.queries) - 1
    low, _, _, high = seen(row, last, head.keys, head.shift, mask.left, mask.right, blocks.N)
    if (col >= low) & (col < high):
        q_tile = load_tile(matrix(q, batch, h, head.q0), row, head.queries, blocks, blocks.M, True)
        k_tile = load_tile(matrix(k, batch, h // blocks.GROUP, head.k0), col, head.keys, blocks, blocks.N, True)
        shift = shift_of(load_numbers(numbers(lse_ptr, mask, h, head, H), rows, head.queries, -INF, True), blocks)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision=blocks.PRECISION)
        if blocks.NATURAL:
            score = score * scale
        score = masked(score, head, mask, row, col, offs_m[:, None], offs_n[None, :], True)
        weight = exponential(score, shift[:, None], scale, blocks)
        if dropout is not None:
            seed = tl.load(dropout.seed_ptr)
            kept = _triton.kept(seed, dropout.threshold, head.outer, rows, col, blocks.N)
            weight = tl.where(kept, weight * dropout.keep_scale, 0.0)
    weights_ptr += (head.outer * head.queries + row) * head.own_keys
    ptrs = weights_ptr + (offs_m[:, None] * head.own_keys + cols[None, :])
    mask_store = (rows[:, None] < head.queries) & (cols[None, :] < head.own_keys)
    tl.store(ptrs, weight.to(weights_ptr.dtype.element_ty), mask=mask_store)
