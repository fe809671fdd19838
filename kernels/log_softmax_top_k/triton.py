"""log-softmax and top-k in Triton, for tensors on a GPU: one pass over the logits, and a merge of what it keeps.

How the work is cut. In the first kernel a program has one part of a row, so that the few rows of one sentence fill a
GPU too: it writes the part's k best logits with their tokens, its maximum and its Σ exp(x - maximum). In the second a
program has one sentence: it merges the parts of each of its rows, makes log-probabilities of their k best, and takes
the best of all rows. How a row is cut depends on V alone, so that a sentence's bits are its own.

What bounds it: memory. A part is not sorted: the k best of its numbers lie in the k groups of neighbours whose maxima
are highest, since each of these holds a number at least as good as its maximum. So 1 of 32 numbers is sorted, then the
k groups, which are read again while they are in the cache; a part no longer than these is sorted whole. What is kept
is 1 % of the logits for k = 8 and 16 bits.

Order. A logit and its token are one int64, which is greater where the logit is higher or, of equal ones, the token
lower; likewise a value and its place among its beams' k best. So maxima of numbers that all differ decide every tie.
Nothing is fused into multiply-adds: of a sum of products over two lanes each would add the other's rounded product to
its own unrounded one, and with sums that differ in the last bit equal logits would have values that do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from fused_transformer.kernels.log_softmax_top_k import native

# Columns of a part at most: 16 elements a thread of 8 warps. 8 parts for 32,000 tokens: with 4 beams, 32 programs for
# one sentence.
PART = 4096
GROUP = 32  # neighbours of which one is sorted: 128 of a part, more than the 64 that may be kept
ROWS_WARPS = 8
MERGE_TILE, MERGE_WARPS = 1024, 4  # keys that a merge sorts at once, 8 a thread
MOST_MERGE_WARPS = 16  # where there are more, as 64 beams of 64 are: 4 warps would spill

INF = tl.constexpr(float("inf"))
LAST_TOKEN = tl.constexpr(0x7FFFFFFF)
ABSENT = tl.constexpr(-(2**63))


@triton.jit
def _key(x, index):
    """int64: the higher the float32 x, the greater; of equal x, the greater where the index is lower."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 too
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ LAST_TOKEN).to(tl.int64)


@triton.jit
def _number(key):
    """The x of a key."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _index(key):
    """The index of a key; that of ABSENT is LAST_TOKEN."""
    return ((key & LAST_TOKEN) ^ LAST_TOKEN).to(tl.int32)


@triton.jit
def log_softmax_top_k_rows_kernel(
    logits_ptr,
    kept_ptr,
    sums_ptr,
    V,
    stride_logits_r,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    """Grid (rows · parts,). kept: (rows, parts, K) keys, best first; sums: (rows, parts, 2), maximum and Σ exp.

    Σ is NaN where a logit is NaN or +inf, and 0 where all are -inf.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(V, PART)
    row_ptr = logits_ptr + pid // parts * stride_logits_r
    first = (pid % parts).to(tl.int32) * PART
    col = first + tl.arange(0, PART)
    x = tl.load(row_ptr + col, mask=col < V, other=-INF).to(tl.float32)  # [PART]
    grouped = tl.reshape(x, (PART // GROUP, GROUP))
    maxima = tl.max(grouped, 1)  # [PART / GROUP]
    top = tl.max(maxima, 0)
    shift = tl.where(top == -INF, 0.0, top)
    total = tl.sum(tl.sum(tl.exp(grouped - shift), 1), 0)

    if PART > K * GROUP:
        group = _index(tl.topk(_key(maxima, tl.arange(0, PART // GROUP)), K))  # [K]
        col = tl.reshape(first + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (K * GROUP,))
        x = tl.load(row_ptr + col, mask=col < V, other=0.0).to(tl.float32)
    best = tl.topk(tl.where(col < V, _key(x, col), ABSENT), K)  # [K]
    tl.store(kept_ptr + pid * K + tl.arange(0, K), best)
    tl.store(sums_ptr + 2 * pid, top)
    tl.store(sums_ptr + 2 * pid + 1, total)


@triton.jit(do_not_specialize=["beams", "parts", "k"])
def log_softmax_top_k_merge_kernel(
    kept_ptr,
    sums_ptr,
    addend_ptr,
    values_ptr,
    places_ptr,
    beams,
    parts,
    V,
    k,
    K: tl.constexpr,
    BEAMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (sentences,). BEAMS is at least `beams`, K at least k; PARTS of each row are merged at once."""
    sentence = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, BEAMS)
    mask_beam = beam < beams
    row = sentence * beams + beam  # [BEAMS]
    rank = tl.arange(0, K)
    part = tl.arange(0, PARTS)

    top = tl.full([BEAMS], -INF, tl.float32)
    total = tl.zeros([BEAMS], tl.float32)
    best = tl.full([BEAMS, K], ABSENT, tl.int64)
    for start in range(0, parts, PARTS):
        place = row[:, None] * parts + start + part[None, :]  # [BEAMS, PARTS]
        mask_part = mask_beam[:, None] & (start + part < parts)[None, :]
        some_top = tl.load(sums_ptr + 2 * place, mask=mask_part, other=-INF)
        some_total = tl.load(sums_ptr + 2 * place + 1, mask=mask_part, other=0.0)
        new_top = tl.maximum(top, tl.max(some_top, 1))
        shift = tl.where(new_top == -INF, 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(some_total * tl.exp(some_top - shift[:, None]), 1)
        top = new_top
        ptrs = kept_ptr + place[:, :, None] * K + rank[None, None, :]
        key = tl.load(ptrs, mask=mask_part[:, :, None], other=ABSENT)  # [BEAMS, PARTS, K]
        some = tl.topk(tl.reshape(key, (BEAMS, PARTS * K)), K)  # [BEAMS, K]
        best = tl.topk(tl.reshape(tl.join(best, some), (BEAMS, 2 * K)), K)

    log_sum = tl.log(total)
    hopeless = log_sum != log_sum
    x = _number(best)
    shift = tl.where(top == -INF, 0.0, top)
    value = tl.where(x == -INF, -INF, (x - shift[:, None]) - log_sum[:, None])  # [BEAMS, K]
    if addend_ptr is not None:
        addend = tl.load(addend_ptr + row, mask=mask_beam, other=0.0)
        value += addend[:, None]
        hopeless = hopeless | (addend == INF) | (addend != addend)
    place = beam[:, None] * K + rank[None, :]
    key = tl.where(best == ABSENT, ABSENT, _key(value, place))
    chosen = tl.topk(tl.reshape(key, (BEAMS * K,)), K)  # [K]
    place = tl.where(chosen == ABSENT, 0, _index(chosen))
    token = tl.gather(tl.reshape(_index(best), (BEAMS * K,)), place, 0)
    nothing = tl.max((hopeless & mask_beam).to(tl.int32), 0) > 0
    value = tl.where(nothing, float("nan"), _number(chosen))
    at = tl.where(nothing, rank, (place // K).to(tl.int64) * V + token)
    mask_k = rank < k
    tl.store(values_ptr + sentence * k + rank, value, mask=mask_k)
    tl.store(places_ptr + sentence * k + rank, at, mask=mask_k)


def refuses(logits, _addend, beams: int, k: int) -> str | None:
    return native.refuses_sizes(logits, beams, k) or _triton.refuses_tensors(logits=logits)


def forward(logits, addend, beams: int, k: int):
    rows, vocabulary = logits.shape
    kept_k, some_beams = max(2, triton.next_power_of_2(k)), triton.next_power_of_2(beams)  # tl.topk wants 2 at least
    part = min(PART, max(GROUP, kept_k, triton.next_power_of_2(vocabulary)))
    sentences, parts = rows // beams, triton.cdiv(vocabulary, part)
    values = logits.new_empty((sentences, k), dtype=torch.float32)
    places = logits.new_empty((sentences, k), dtype=torch.int64)
    if sentences == 0:
        return values, places
    kept = logits.new_empty((rows, parts, kept_k), dtype=torch.int64)
    sums = logits.new_empty((rows, parts, 2), dtype=torch.float32)
    keys = some_beams * kept_k
    at_once = min(triton.next_power_of_2(parts), max(1, MERGE_TILE // keys))
    with _triton.current(logits):
        log_softmax_top_k_rows_kernel[(rows * parts,)](
            *(logits, kept, sums, vocabulary, logits.stride(0)),
            K=kept_k,
            GROUP=GROUP,
            PART=part,
            num_warps=ROWS_WARPS,
            enable_fp_fusion=False,
        )
        log_softmax_top_k_merge_kernel[(sentences,)](
            *(kept, sums, addend, values, places),
            *(beams, parts, vocabulary, k),
            K=kept_k,
            BEAMS=some_beams,
            PARTS=at_once,
            num_warps=MERGE_WARPS if keys <= MERGE_TILE else MOST_MERGE_WARPS,
            enable_fp_fusion=False,
        )
    return values, places
