"""Attention backward in Triton: two passes that recompute the weights from lse; nothing is added atomically.

    P = exp(S - lse),  dP = dO vᵀ,  dS = P (dP - delta),  dQ = scale dS k      a program: some queries of one head
    delta = Σ_d dO · out                                                       made by the pass above for the one below
    dV = Pᵀ dO,  dK = scale dSᵀ q                                              a program: some keys of one key head

14 · D operations a score, of which 4 · D are recomputed for the second pass; bound by the tensor cores. The second pass
holds tiles transposed, keys by queries, so that Pᵀ and dSᵀ are operands as they come, and goes through all query heads
of its key head.

As in the forward pass, nothing in the loops guards against 0 · NaN. A program whose sums are not finite sums again with
what could have leaked taken as 0: NaN and infinities in k, for dQ, and queries that see nothing, for dK and dV.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from fused_transformer.kernels.attention.triton_tiles import (
    INF,
    any_unfinite,
    exponential,
    finite_or_zero,
    head_of,
    load_numbers,
    load_tile,
    masked,
    matrix,
    queries_of,
    seen,
    shift_of,
    store_numbers,
    store_tile,
)


@triton.jit
def _query_gradient(
    dq, rows, k_rows, v_rows, head, mask, dropout, first, low, high, scale, blocks,
    EDGE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Adds Σ dS k over keys low ... high to dq. SAFE: NaN and Inf in k count as 0 there."""
    q, dout, shift, delta = rows
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    if low < high:  # else the compiler serializes the products of several such loops in a row
        for start in tl.range(low, high, blocks.N, num_stages=1 if SAFE else None):
            k = load_tile(k_rows, start, head.keys, blocks, blocks.N, EDGE)
            score = tl.dot(q, tl.trans(k), input_precision=blocks.PRECISION)  # [M, N]
            if blocks.NATURAL:
                score = score * scale
            score = masked(score, head, mask, first, start, offs_m[:, None], offs_n[None, :], EDGE)
            weight = exponential(score, shift[:, None], scale, blocks)
            v = load_tile(v_rows, start, head.keys, blocks, blocks.N, EDGE)
            dweight = tl.dot(dout, tl.trans(v), input_precision=blocks.PRECISION)  # [M, N]
            if dropout is not None:
                seed = tl.load(dropout.seed_ptr)
                kept = _triton.kept(seed, dropout.threshold, head.outer, first + offs_m, start, blocks.N)
                dweight = tl.where(kept, dweight * dropout.keep_scale, 0.0)
            dscore = weight * (dweight - delta[:, None])
            if SAFE:
                dscore = tl.where(score == -INF, 0.0, dscore)  # dweight is NaN where a masked v is
                k = finite_or_zero(k)
            dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=blocks.PRECISION)  # [M, WIDTH]
    return dq


@triton.jit(do_not_specialize=["H", "tiles"])
def attention_dq_kernel(q, k, v, mask, dropout, out, dout, lse_ptr, delta_ptr, dq, H, tiles, scale, blocks):
    """Grid (tiles · B · H,), as the forward kernel's. Writes dq and delta."""
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * blocks.M
    batch = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    head = head_of(mask, batch, h, H)
    if first >= head.queries:
        return
    queries = queries_of(q, dout, lse_ptr, delta_ptr, mask, batch, h, head, H)
    q_tile = load_tile(queries.q, first, head.queries, blocks, blocks.M, True)
    dout_tile = load_tile(queries.dout, first, head.queries, blocks, blocks.M, True)
    out_tile = load_tile(matrix(out, batch, h, head.q0), first, head.queries, blocks, blocks.M, True)
    offs_m = first + tl.arange(0, blocks.M)
    row_lse = load_numbers(queries.lse, offs_m, head.queries, -INF, True)
    dead = row_lse == -INF
    row_delta = tl.where(dead, 0.0, tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1))
    store_numbers(queries.delta, offs_m, head.queries, row_delta)

    rows = q_tile, dout_tile, shift_of(row_lse, blocks), row_delta
    k_rows = matrix(k, batch, h // blocks.GROUP, head.k0)
    v_rows = matrix(v, batch, h // blocks.GROUP, head.k0)
    last = tl.minimum(first + blocks.M, head.queries) - 1
    low, full_low, full_high, high = seen(first, last, head.keys, head.shift, mask.left, mask.right, blocks.N)
    zeros = tl.zeros([blocks.M, blocks.WIDTH], dtype=tl.float32)
    acc = zeros
    if mask.left is not None:
        acc = _query_gradient(
            acc, rows, k_rows, v_rows, head, mask, dropout, first, low, full_low, scale, blocks, True, False
        )
    acc = _query_gradient(
        acc, rows, k_rows, v_rows, head, mask, dropout, first, full_low, full_high, scale, blocks, False, False
    )
    acc = _query_gradient(
        acc, rows, k_rows, v_rows, head, mask, dropout, first, full_high, high, scale, blocks, True, False
    )
    if blocks.HIDES:  # noqa: SIM102  the outer one is decided when compiled
        if any_unfinite(acc):
            acc = _query_gradient(
                zeros, rows, k_rows, v_rows, head, mask, dropout, first, low, high, scale, blocks, True, True
            )
    acc = tl.where(dead[:, None], 0.0, acc * scale)
    store_tile(matrix(dq, batch, h, head.q0), first, head.queries, acc, blocks, blocks.M)


@triton.jit
def _key_gradients(
    dk, dv, k, v, queries, head, mask, dropout, first, low, high, scale, blocks,
    EDGE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Adds Σ dSᵀ q and Σ Pᵀ dO over a head's queries low ... high. SAFE: those that see nothing count as 0."""
    offs_m = tl.arange(0, blocks.M)
    offs_n = tl.arange(0, blocks.N)
    if low < high:  # else the compiler serializes the products of several such loops in a row
        for start in tl.range(low, high, blocks.M, num_stages=1 if SAFE else None):
            lse = load_numbers(queries.lse, start + offs_m, head.queries, -INF, EDGE)
            alive = None
            if SAFE:
                alive = lse != -INF
            q = load_tile(queries.q, start, head.queries, blocks, blocks.M, EDGE, alive)
            score = tl.dot(k, tl.trans(q), input_precision=blocks.PRECISION)  # [N, M]
            if blocks.NATURAL:
                score = score * scale
            score = masked(score, head, mask, start, first, offs_m[None, :], offs_n[:, None], EDGE)
            weight = exponential(score, shift_of(lse, blocks)[None, :], scale, blocks)
            dout = load_tile(queries.dout, start, head.queries, blocks, blocks.M, EDGE, alive)
            dropped = weight
            if dropout is not None:
                seed = tl.load(dropout.seed_ptr)
                kept = tl.trans(_triton.kept(seed, dropout.threshold, head.outer, start + offs_m, first, blocks.N))
                dropped = tl.where(kept, weight, 0.0)
            dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=blocks.PRECISION)  # [N, WIDTH]
            dweight = tl.dot(v, tl.trans(dout), input_precision=blocks.PRECISION)  # [N, M]
            if dropout is not None:
                dweight = tl.where(kept, dweight * dropout.keep_scale, 0.0)
            delta = load_numbers(queries.delta, start + offs_m, head.queries, 0.0, EDGE)
            dscore = weight * (dweight - delta[None, :])
            if SAFE:
                dscore = tl.where(score == -INF, 0.0, dscore)
            dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=blocks.PRECISION)  # [N, WIDTH]
    return dk, dv


@triton.jit(do_not_specialize=["H", "tiles"])
def attention_dkdv_kernel(q, k, v, mask, dropout, dout, lse_ptr, delta_ptr, dk, dv, H, tiles, scale, blocks):
    """Grid (tiles · B · key heads,). A head's first keys go first: under a causal mask most queries see them."""
    pid = tl.program_id(0)
    k_heads = H // blocks.GROUP
    first = pid % tiles * blocks.N
    batch = (pid // tiles // k_heads).to(tl.int64)
    hk = (pid // tiles % k_heads).to(tl.int64)
    some = head_of(mask, batch, hk * blocks.GROUP, H)
    if first >= some.own_keys:
        return
    # Rows of k and v at and beyond `keys` are loaded as 0. What they get is dropped in the end.
    k_tile = load_tile(matrix(k, batch, hk, some.k0), first, some.keys, blocks, blocks.N, True)
    v_tile = load_tile(matrix(v, batch, hk, some.k0), first, some.keys, blocks, blocks.N, True)
    last = tl.minimum(first + blocks.N, some.keys) - 1
    low, full_low, full_high, high = seen(first, last, some.queries, -some.shift, mask.right, mask.left, blocks.M)
    if first >= some.keys:
        high = low
        full_low = low
        full_high = low
    if mask.keep is not None or mask.bias is not None:  # noqa: SIM102
        if last < first + blocks.N - 1:  # these end where the keys do: only EDGE tiles keep to that
            full_low = low
            full_high = low
    zeros = tl.zeros([blocks.N, blocks.WIDTH], dtype=tl.float32)
    acc_k, acc_v = zeros, zeros
    for member in range(blocks.GROUP):
        h = hk * blocks.GROUP + member
        head = head_of(mask, batch, h, H)
        queries = queries_of(q, dout, lse_ptr, delta_ptr, mask, batch, h, head, H)
        if mask.right is not None:
            acc_k, acc_v = _key_gradients(
                acc_k, acc_v, k_tile, v_tile, queries, head, mask, dropout, first, low, full_low, scale, blocks,
                True, False,
            )  # fmt: skip
        acc_k, acc_v = _key_gradients(
            acc_k, acc_v, k_tile, v_tile, queries, head, mask, dropout, first, full_low, full_high, scale, blocks,
            False, False,
        )  # fmt: skip
        acc_k, acc_v = _key_gradients(
            acc_k, acc_v, k_tile, v_tile, queries, head, mask, dropout, first, full_high, high, scale, blocks,
            True, False,
        )  # fmt: skip
    real = (first + tl.arange(0, blocks.N) < some.keys)[:, None]
    acc_k = tl.where(real, acc_k, 0.0)
    acc_v = tl.where(real, acc_v, 0.0)
    if blocks.HIDES:  # noqa: SIM102  the outer one is decided when compiled
        if any_unfinite(acc_k) | any_unfinite(acc_v):
            acc_k, acc_v = zeros, zeros
            for member in range(blocks.GROUP):
                h = hk * blocks.GROUP + member
                head = head_of(mask, batch, h, H)
                queries = queries_of(q, dout, lse_ptr, delta_ptr, mask, batch, h, head, H)
                acc_k, acc_v = _key_gradients(
                    acc_k, acc_v, k_tile, v_tile, queries, head, mask, dropout, first, low, high, scale, blocks,
                    True, True,
                )  # fmt: skip
    if dropout is not None:
        acc_v = acc_v * dropout.keep_scale
    store_tile(matrix(dk, batch, hk, some.k0), first, some.own_keys, acc_k * scale, blocks, blocks.N)
    store_tile(matrix(dv, batch, hk, some.k0), first, some.own_keys, acc_v, blocks, blocks.N)
