"""The gradient of attention's bias in Triton: Σ dS over the axes that the bias broadcasts, in a fixed order.

A program owns one tile of the bias, recomputes dS of every tile of scores that it was added to, and keeps the sum in
registers. So nothing of size (B, H, L, S) exists unless the bias has that size. Where a bias is small and the batch
large, the sum is split over programs, whose float32 parts are added afterwards.
"""

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
    queries_of,
    seen,
    shift_of,
)


@triton.jit
def _sum_of_rows(x, blocks):
    """[N] sums over the rows of [M, N], as sums of 8 sums: the error of one long chain would show in float32."""
    return tl.sum(tl.sum(tl.reshape(x, [8, blocks.M // 8, blocks.N]), 1), 0)


@triton.jit(do_not_specialize=["H", "bias_b", "bias_h", "bias_l", "bias_s", "batches", "heads", "pairs"])
def attention_dbias_kernel(
    q, k, v, mask, dropout, dout, lse_ptr, delta_ptr, dbias_ptr, H, bias_b, bias_h, bias_l, bias_s,
    batches, heads, pairs, scale, blocks, SUM_L: tl.constexpr, SUM_S: tl.constexpr,
):  # fmt: skip
    """Grid (parts · B' · H' · tiles of L' · tiles of S',), where (B', H', L', S') is the bias's shape.

    Each element sums over batches · heads = parts · pairs pairs of these. dbias: (parts, B', H', L', S') float32,
    contiguous.
    """
    pid = tl.program_id(0)
    tiles_s = tl.cdiv(bias_s, blocks.N)
    tiles_l = tl.cdiv(bias_l, blocks.M)
    first_col = pid % tiles_s * blocks.N
    first_row = pid // tiles_s % tiles_l * blocks.M
    outer = pid // tiles_s // tiles_l  # (part · B' + b') · H' + h'
    h0 = outer % bias_h
    b0 = outer // bias_h % bias_b
    part = outer // bias_h // bias_b
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    total = tl.zeros([blocks.M, blocks.N], dtype=tl.float32)
    for pair in range(part * pairs, tl.minimum(part * pairs + pairs, batches * heads)):
        batch = tl.cast(b0 + pair // heads, tl.int64)
        h = tl.cast(h0 + pair % heads, tl.int64)
        head = head_of(mask, batch, h, H)
        queries = queries_of(q, dout, lse_ptr, delta_ptr, mask, batch, h, head, H)
        k_rows = matrix(k, batch, h // blocks.GROUP, head.k0)
        v_rows = matrix(v, batch, h // blocks.GROUP, head.k0)
        row_high = head.queries
        if not SUM_L:
            row_high = tl.minimum(row_high, first_row + blocks.M)
        for row in range(first_row, row_high, blocks.M):
            q_tile = load_tile(queries.q, row, head.queries, blocks, blocks.M, True)
            dout_tile = load_tile(queries.dout, row, head.queries, blocks, blocks.M, True)
            rows = row + offs_m
            shift = shift_of(load_numbers(queries.lse, rows, head.queries, -INF, True), blocks)
            row_delta = load_numbers(queries.delta, rows, head.queries, 0.0, True)
            last = tl.minimum(row + blocks.M, head.queries) - 1
            low, _, _, high = seen(row, last, head.keys, head.shift, mask.left, mask.right, blocks.N)
            if not SUM_S:
                low = tl.maximum(low, first_col)
                high = tl.minimum(high, first_col + blocks.N)
            for col in range(low, high, blocks.N):
                k_tile = load_tile(k_rows, col, head.keys, blocks, blocks.N, True)
                v_tile = load_tile(v_rows, col, head.keys, blocks, blocks.N, True)
                score = tl.dot(q_tile, tl.trans(k_tile), input_precision=blocks.PRECISION) * scale  # [M, N]
                score = masked(score, head, mask, row, col, offs_m[:, None], offs_n[None, :], True)
                weight = exponential(score, shift[:, None], scale, blocks)
                dweight = tl.dot(dout_tile, tl.trans(v_tile), input_precision=blocks.PRECISION)
                if dropout is not None:
                    seed = tl.load(dropout.seed_ptr)
                    kept = _triton.kept(seed, dropout.threshold, head.outer, rows, col, blocks.N)
                    dweight = tl.where(kept, dweight * dropout.keep_scale, 0.0)
                dscore = weight * (dweight - row_delta[:, None])
                total += tl.where(score == -INF, 0.0, dscore)
    rows = first_row + offs_m
    cols = first_col + offs_n
    dbias_ptr += tl.cast(outer, tl.int64) * bias_l * bias_s
    if SUM_L and SUM_S:
        tl.store(dbias_ptr, tl.sum(_sum_of_rows(total, blocks), 0))
    elif SUM_L:
        tl.store(dbias_ptr + cols, _sum_of_rows(total, blocks), mask=cols < bias_s)
    elif SUM_S:
        tl.store(dbias_ptr + rows, tl.sum(total, 1), mask=rows < bias_l)
    else:
        dbias_ptr += tl.cast(first_row, tl.int64) * bias_s
        ptrs = dbias_ptr + (offs_m[:, None] * bias_s + cols[None, :])
        tl.store(ptrs, total, mask=(rows[:, None] < bias_l) & (cols[None, :] < bias_s))
