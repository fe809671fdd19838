"""The kernels of decode attention in Triton; triton.py launches them and says how the work is cut."""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# What changes from call to call: no kernel is compiled anew for it.
SIZES = ["heads_k", "heads", "group", "queries", "capacity", "cache_rows", "split_keys", "splits", "stride_rows_b"]


@triton.jit
def _clamped(x, low, high):
    """x, a number out of memory, as int32 in low ... high: whatever it is, it does not lead out of the cache."""
    return tl.minimum(tl.maximum(x, low), high).to(tl.int32)


@triton.jit
def _keys(lengths_ptr, b, capacity):
    """How many keys sequence b has."""
    if lengths_ptr is None:
        return capacity
    else:  # without it Triton before 3.7 compiles what follows, for a pointer that is None
        return _clamped(tl.load(lengths_ptr + b), 0, capacity)


@triton.jit
def _row_start(cache_ptr, rows_ptr, b, h, cache_rows, stride_rows_b, stride_r, stride_h, TABLE: tl.constexpr):
    """Where the cache holds position 0 of a head; with a table, position 0 of that head in row 0."""
    row = b
    if TABLE:
        row = b * 0
    elif rows_ptr is not None:
        row = _clamped(tl.load(rows_ptr + b * stride_rows_b), 0, cache_rows - 1).to(tl.int64)
    return cache_ptr + row * stride_r + h * stride_h


@triton.jit
def _offsets(
    table_ptr, offs_n, present, cache_rows, stride_k_r, stride_k_c, stride_v_r, stride_v_c, TABLE: tl.constexpr
):  # fmt: skip
    """Where the keys and the values at positions offs_n are, from `_row_start`: two times [BLOCK_N]."""
    position = offs_n.to(tl.int64)
    k_offset, v_offset = position * stride_k_c, position * stride_v_c
    if TABLE:
        row = _clamped(tl.load(table_ptr + offs_n, mask=present, other=0), 0, cache_rows - 1).to(tl.int64)
        k_offset += row * stride_k_r
        v_offset += row * stride_v_r
    return k_offset, v_offset


@triton.jit
def _load(ptr, offsets, present, first_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(offsets), BLOCK_D]: columns first_d ... of rows at `offsets`; 0 where not `present` and beyond D."""
    offs_d = first_d + tl.arange(0, BLOCK_D)
    return tl.load(ptr + offsets[:, None] + offs_d[None, :], mask=present[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _not_infinite(x):
    """x, or 0 where it is -inf: what to subtract from scores that may all be -inf, so that exp gives 0 and not NaN."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit(do_not_specialize=SIZES)
def decode_attention_row_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, rows_ptr,
    out_ptr, lse_ptr, partial_ptr, statistics_ptr,
    heads_k, capacity, cache_rows, split_keys, splits,
    stride_q_b, stride_q_h, stride_k_r, stride_k_h, stride_k_c, stride_v_r, stride_v_h, stride_v_c,
    stride_out_b, stride_out_h, stride_rows_b,
    scale,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query of a key head beside one split of its keys. Grid (B · H, splits).

    Products and sums are element by element: a tensor core would take 16 queries for the one there is, and the float32
    sums here cost no more time than the cache takes to arrive. The sums stay spread over the block's keys to the end.
    """
    b = (tl.program_id(0) // heads_k).to(tl.int64)
    h = (tl.program_id(0) % heads_k).to(tl.int64)
    split = tl.program_id(1)
    first = split * split_keys
    stop = tl.minimum(first + split_keys, _keys(lengths_ptr, b, capacity))
    if (splits > 1) & (stop <= first):
        return
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + b * stride_q_b + h * stride_q_h + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    q = q * (scale * LOG2E)  # [BLOCK_D]
    k_ptr = _row_start(k_ptr, rows_ptr, b, h, cache_rows, stride_rows_b, stride_k_r, stride_k_h, TABLE)
    v_ptr = _row_start(v_ptr, rows_ptr, b, h, cache_rows, stride_rows_b, stride_v_r, stride_v_h, TABLE)
    table_ptr = rows_ptr
    if TABLE:
        table_ptr = rows_ptr + b * stride_rows_b

    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    peak = tl.full([1], -INF, dtype=tl.float32)
    for start in range(first, stop, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        present = offs_n < stop
        k_offset, v_offset = _offsets(
            table_ptr, offs_n, present, cache_rows, stride_k_r, stride_k_c, stride_v_r, stride_v_c, TABLE
        )
        k = _load(k_ptr, k_offset, present, 0, D, BLOCK_D)
        v = _load(v_ptr, v_offset, present, 0, D, BLOCK_D)
        score = tl.where(present, tl.sum(k.to(tl.float32) * q[None, :], 1), -INF)  # [BLOCK_N]
        new_peak = tl.maximum(peak, tl.max(score, 0))  # [1]
        shift = _not_infinite(new_peak)
        weight = tl.exp2(score - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + weight
        acc = acc * decay[:, None] + weight[:, None] * v.to(tl.float32)
        peak = new_peak

    row = b * heads_k + h
    peak = tl.max(peak, 0)
    total = tl.sum(total, 0)
    acc = tl.sum(acc, 0)  # [BLOCK_D]
    if splits == 1:
        alive = total != 0.0
        out = tl.where(alive, acc / tl.where(alive, total, 1.0), 0.0)
        out_ptrs = out_ptr + b * stride_out_b + h * stride_out_h + offs_d
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, tl.where(alive, (peak + tl.log2(total)) * LN2, -INF))
    else:
        part = row * splits + split
        tl.store(partial_ptr + part * D + offs_d, acc, mask=offs_d < D)
        tl.store(statistics_ptr + 2 * part, peak)
        tl.store(statistics_ptr + 2 * part + 1, total)


@triton.jit
def _add_unfinite(acc, v, seen):
    """acc + v's NaN and infinities, in the rows that see their keys."""
    v = v.to(tl.float32)
    for sign in tl.static_range(-1, 2, 2):
        bad = (v == sign * INF) | (v != v)  # NaN counts as both infinities, as their sum is NaN
        reached = tl.dot(seen.to(tl.float16), bad.to(tl.float16))  # counts of at most BLOCK_N: exact
        acc = tl.where(reached > 0, acc + sign * INF, acc)
    return acc


@triton.jit
def _fold(
    state, q_ptr, q_offset, real, k_ptr, v_ptr, table_ptr, start, stop, limit, scale, cache_rows,
    stride_k_r, stride_k_c, stride_v_r, stride_v_c,
    EDGE: tl.constexpr, RAGGED: tl.constexpr, TABLE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Folds a block of keys into the running softmax (acc, total, peak) of the rows.

    EDGE: row m sees only keys below limit[m], and there may be fewer than a block. RAGGED: the limits differ. Then a
    key that some rows see and others do not may hold NaN, which times a weight of 0 stays NaN: the product takes it
    as 0. The queries are loaded again for every block, out of the cache: held, they cost more registers than that time.
    """
    acc, total, peak = state
    offs_n = start + tl.arange(0, BLOCK_N)
    present = offs_n < stop
    k_offset, v_offset = _offsets(
        table_ptr, offs_n, present, cache_rows, stride_k_r, stride_k_c, stride_v_r, stride_v_c, TABLE
    )
    score = tl.zeros([q_offset.shape[0], BLOCK_N], dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
    for d in tl.static_range(0, BLOCK_D, BLOCK_C):
        q = _load(q_ptr, q_offset, real, d, D, BLOCK_C)
        k = _load(k_ptr, k_offset, present, d, D, BLOCK_C)
        score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
    v = _load(v_ptr, v_offset, present, 0, D, BLOCK_D)
    score = score * (scale * LOG2E)
    seen = offs_n[None, :] < limit[:, None]
    if EDGE:
        score = tl.where(seen, score, -INF)
    new_peak = tl.maximum(peak, tl.max(score, 1))
    shift = _not_infinite(new_peak)
    weight = tl.exp2(score - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weight, 1)
    acc = acc * decay[:, None]
    if EDGE and RAGGED:
        finite = tl.abs(v.to(tl.float32)) < INF
        safe = tl.where(finite, v, 0.0)
        acc = tl.dot(weight.to(v.dtype), safe, acc, input_precision=PRECISION)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            acc = _add_unfinite(acc, v, seen)
    else:
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=SIZES)
def decode_attention_rows_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, rows_ptr,
    out_ptr, lse_ptr, partial_ptr, statistics_ptr,
    heads_k, group, queries, capacity, cache_rows, split_keys, splits,
    stride_q_b, stride_q_h, stride_q_l, stride_k_r, stride_k_h, stride_k_c, stride_v_r, stride_v_h, stride_v_c,
    stride_out_b, stride_out_h, stride_out_l, stride_rows_b,
    scale,
    RAGGED: tl.constexpr, TABLE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries of all heads that share a key head, beside one split of its keys. Grid (B · H_k · tiles, splits).

    Row m of a tile is query m % L of the group's head m // L. RAGGED: each query sees one key more than the one before.
    Keys that all queries see come first; the last blocks, where they differ or the keys end, are masked.
    """
    tiles = tl.cdiv(group * queries, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // heads_k).to(tl.int64)
    h = (pid // tiles % heads_k).to(tl.int64)
    split = tl.program_id(1)
    keys = _keys(lengths_ptr, b, capacity)
    first = split * split_keys
    stop = tl.minimum(first + split_keys, keys)
    if (splits > 1) & (stop <= first):
        return
    offs_m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    head = h * group + offs_m // queries  # [BLOCK_M]
    query = offs_m % queries
    real = offs_m < group * queries
    q_offset = b * stride_q_b + head * stride_q_h + query.to(tl.int64) * stride_q_l
    k_ptr = _row_start(k_ptr, rows_ptr, b, h, cache_rows, stride_rows_b, stride_k_r, stride_k_h, TABLE)
    v_ptr = _row_start(v_ptr, rows_ptr, b, h, cache_rows, stride_rows_b, stride_v_r, stride_v_h, TABLE)
    table_ptr = rows_ptr
    if TABLE:
        table_ptr = rows_ptr + b * stride_rows_b

    seen_by_all = keys
    limit = keys + 0 * query
    if RAGGED:
        seen_by_all = keys - (queries - 1)
        limit = keys - (queries - 1 - query)
    whole = tl.maximum(tl.minimum(stop, seen_by_all) - first, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -INF, dtype=tl.float32)
    state = acc, total, peak
    for start in range(first, first + whole, BLOCK_N):
        state = _fold(
            state, q_ptr, q_offset, real, k_ptr, v_ptr, table_ptr, start, stop, limit, scale, cache_rows, stride_k_r,
            stride_k_c, stride_v_r, stride_v_c, False, RAGGED, TABLE, PRECISION, D, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    for start in tl.range(first + whole, stop, BLOCK_N, num_stages=1):
        state = _fold(
            state, q_ptr, q_offset, real, k_ptr, v_ptr, table_ptr, start, stop, limit, scale, cache_rows, stride_k_r,
            stride_k_c, stride_v_r, stride_v_c, True, RAGGED, TABLE, PRECISION, D, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    acc, total, peak = state

    row = (b * heads_k * group + head) * queries + query
    mask = real[:, None] & (offs_d < D)[None, :]
    if splits == 1:
        alive = total != 0.0
        out = tl.where(alive[:, None], acc / tl.where(alive, total, 1.0)[:, None], 0.0)
        out_ptrs = (
            out_ptr + b * stride_out_b + head[:, None] * stride_out_h + query[:, None].to(tl.int64) * stride_out_l
        )
        tl.store(out_ptrs + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, tl.where(alive, (peak + tl.log2(total)) * LN2, -INF), mask=real)
    else:
        part = row * splits + split
        tl.store(partial_ptr + part[:, None] * D + offs_d[None, :], acc, mask=mask)
        tl.store(statistics_ptr + 2 * part, peak, mask=real)
        tl.store(statistics_ptr + 2 * part + 1, total, mask=real)


@triton.jit(do_not_specialize=SIZES)
def decode_attention_merge_kernel(
    partial_ptr, statistics_ptr, lengths_ptr, out_ptr, lse_ptr,
    heads, queries, capacity, split_keys, splits,
    stride_out_b, stride_out_h, stride_out_l,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The splits of one query row, in order, BLOCK_S at a time; beyond the keys there are none. Grid (B · H · L,)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // queries // heads
    used = tl.cdiv(_keys(lengths_ptr, b, capacity), split_keys)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    peak = tl.full([1], -INF, dtype=tl.float32)
    for start in range(0, used, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part = row * splits + offs_s
        peaks = tl.load(statistics_ptr + 2 * part, mask=offs_s < used, other=-INF)  # [BLOCK_S]
        totals = tl.load(statistics_ptr + 2 * part + 1, mask=offs_s < used, other=0.0)
        mask = (offs_s < used)[:, None] & (offs_d < D)[None, :]
        parts = tl.load(partial_ptr + part[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = _not_infinite(new_peak)
        weight = tl.exp2(peaks - shift)
        decay = tl.exp2(peak - shift)  # [1]
        total = total * decay + tl.sum(weight * totals, 0)
        acc = acc * decay + tl.sum(weight[:, None] * parts, 0)
        peak = new_peak
    alive = total != 0.0  # [1]
    out = tl.where(alive, acc / tl.where(alive, total, 1.0), 0.0)
    out_ptrs = (
        out_ptr + b * stride_out_b + row // queries % heads * stride_out_h + row % queries * stride_out_l + offs_d
    )
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
    if lse_ptr is not None:
        tl.store(lse_ptr + row + tl.arange(0, 1), tl.where(alive, (peak + tl.log2(total)) * LN2, -INF))
