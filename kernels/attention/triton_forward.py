"""Attention forward in Triton: an online softmax over blocks of keys. A program is some queries of one head.

    S = scale · q kᵀ + bias,  m = running row maximum,  P = exp(S - m),  out = Σ P v / Σ P,  lse = m + log Σ P

4 · D operations on tensor cores and one exp2 a score: at D 128 the tensor cores bound it, at D 64 the exponentials as
much. k and v come from the second cache, as the programs of a head run side by side.

Nothing in the loops guards against 0 · NaN, from what a key that some queries may not see holds. If the sums are not
finite, the program sums again with NaN and infinities in v taken as 0, and gives them to the queries that do see them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from fused_transformer.kernels.attention.triton_tiles import (
    INF,
    LN2,
    LOG2E,
    any_unfinite,
    exponential,
    finite_or_zero,
    head_of,
    load_tile,
    masked,
    matrix,
    numbers,
    seen,
    store_numbers,
    store_tile,
)


@triton.jit
def _attend(
    state,
    q,
    k_rows,
    v_rows,
    head,
    mask,
    dropout,
    first,
    low,
    high,
    scale,
    blocks,
    EDGE: tl.constexpr,
    SAFE: tl.constexpr,
):
    """Folds keys low ... high into the running softmax (out, sum, maximum). SAFE: NaN and Inf in v count as 0."""
    acc, total, peak = state
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    if low < high:  # else the compiler serializes the products of several such loops in a row
        for start in tl.range(low, high, blocks.N, num_stages=1 if SAFE else None):
            k = load_tile(k_rows, start, head.keys, blocks, blocks.N, EDGE)
            score = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)  # [M, N]
            if blocks.NATURAL:
                score = score * scale
            score = masked(score, head, mask, first, start, offs_m[:, None], offs_n[None, :], EDGE)
            unit = LOG2E if blocks.NATURAL else 1.0
            factor = 1.0 if blocks.NATURAL else scale * LOG2E
            new_peak = tl.maximum(peak, tl.max(score, 1) * factor)
            shift = new_peak
            if EDGE or mask.keep is not None or mask.bias is not None:
                # A row that has seen only masked keys has maximum -inf: shifted by 0 its weights are 0, and not NaN.
                shift = tl.where(new_peak == -INF, 0.0, new_peak)
            weight = exponential(score, shift[:, None], scale, blocks)
            decay = tl.exp2((peak - shift) * unit)
            total = total * decay + tl.sum(weight, 1)
            if dropout is not None:
                seed = tl.load(dropout.seed_ptr)
                kept = _triton.kept(seed, dropout.threshold, head.outer, first + offs_m, start, blocks.N)
                weight = tl.where(kept, weight, 0.0)
            v = load_tile(v_rows, start, head.keys, blocks, blocks.N, EDGE)
            if SAFE:
                v = finite_or_zero(v)
            acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=blocks.PRECISION)  # [M, WIDTH]
            peak = new_peak
    return acc, total, peak


@triton.jit
def _add_unfinite(out_rows, v_rows, head, mask, first, low, high, blocks):
    """Adds the NaN and infinities of v to the rows of out that see them."""
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    for sign in tl.range(-1, 2, 2, num_stages=1):
        reached = tl.zeros([blocks.M, blocks.WIDTH], dtype=tl.float32)
        for start in tl.range(low, high, blocks.N, num_stages=1):
            score = tl.zeros([blocks.M, blocks.N], dtype=tl.float32)
            score = masked(score, head, mask, first, start, offs_m[:, None], offs_n[None, :], True)
            v = load_tile(v_rows, start, head.keys, blocks, blocks.N, True).to(tl.float32)
            bad = (v == sign * INF) | (v != v)  # NaN counts as both infinities, as their sum is NaN
            reached = tl.dot((score != -INF).to(tl.float16), bad.to(tl.float16), reached)
        tl.debug_barrier()  # what other threads stored
        out = load_tile(out_rows, first, head.queries, blocks, blocks.M, True).to(tl.float32)
        store_tile(out_rows, first, head.queries, tl.where(reached > 0, out + sign * INF, out), blocks, blocks.M)


@triton.jit(do_not_specialize=["H", "tiles"])
def attention_forward_kernel(q, k, v, mask, dropout, out, lse_ptr, H, tiles, scale, blocks):
    """Grid (tiles · B · H,). A head's last queries go first: under a causal mask they have the longest rows."""
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * blocks.M
    batch = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    head = head_of(mask, batch, h, H)
    if first >= head.queries:
        return
    q_tile = load_tile(matrix(q, batch, h, head.q0), first, head.queries, blocks, blocks.M, True)
    k_rows = matrix(k, batch, h // blocks.GROUP, head.k0)
    v_rows = matrix(v, batch, h // blocks.GROUP, head.k0)
    acc = tl.zeros([blocks.M, blocks.WIDTH], dtype=tl.float32)
    total = tl.zeros([blocks.M], dtype=tl.float32)
    peak = tl.full([blocks.M], -INF, dtype=tl.float32)
    empty = acc, total, peak
    last = tl.minimum(first + blocks.M, head.queries) - 1
    low, full_low, full_high, high = seen(first, last, head.keys, head.shift, mask.left, mask.right, blocks.N)
    state = empty
    if mask.left is not None:
        state = _attend(
            state, q_tile, k_rows, v_rows, head, mask, dropout, first, low, full_low, scale, blocks, True, False
        )
    state = _attend(
        state, q_tile, k_rows, v_rows, head, mask, dropout, first, full_low, full_high, scale, blocks, False, False
    )
    state = _attend(
        state, q_tile, k_rows, v_rows, head, mask, dropout, first, full_high, high, scale, blocks, True, False
    )
    acc, total, peak = state
    leaked = False
    if blocks.HIDES:
        leaked = any_unfinite(acc)
        if leaked:
            acc, total, peak = _attend(
                empty, q_tile, k_rows, v_rows, head, mask, dropout, first, low, high, scale, blocks, True, True
            )
    keep_scale = 1.0
    if dropout is not None:
        keep_scale = dropout.keep_scale
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    acc = tl.where(dead[:, None], 0.0, acc * (keep_scale / total)[:, None])
    out_rows = matrix(out, batch, h, head.q0)
    store_tile(out_rows, first, head.queries, acc, blocks, blocks.M)
    if not blocks.NATURAL:
        peak = peak * LN2
    row_lse = tl.where(dead, -INF, peak + tl.log(total))
    store_numbers(numbers(lse_ptr, mask, h, head, H), first + tl.arange(0, blocks.M), head.queries, row_lse)
    if blocks.HIDES:  # noqa: SIM102  the outer one is decided when compiled
        if leaked:
            _add_unfinite(out_rows, v_rows, head, mask, first, low, high, blocks)
