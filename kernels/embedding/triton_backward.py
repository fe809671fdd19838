"""Embedding backward in Triton: the gradient of each row of the table is the sum of its tokens' rows of dout.

The tokens come sorted, so that equal ones are a run, and each run is summed in an order that the tokens alone decide:
no atomics. Runs are cut at every `chunk` sorted tokens, so that a token that fills half the batch is summed by many
programs at once; what of a run lies in one chunk is summed by the program of its first token there. A run within one
chunk goes straight into the table's gradient. The others leave partial sums, which a second kernel adds up, one program
a run.

It moves E elements a token in and V E out, most of them the zeros that the host writes first, and 8 bytes for each
element of the partial sums, at most two rows a chunk; bound by memory, or by the longest run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton

RUN_WARPS, RUN_ELEMENTS = 4, 4096  # 32 elements a thread; most runs of natural text are shorter than 8 rows of 512
MERGE_TILE = (16, 128)  # partial sums are float32: whole cache lines, and many programs for a long run
MERGE_WARPS = 4


def run_tile(width: int) -> tuple[int, int]:
    """Rows and columns of the tile in which a program sums a run."""
    cols = min(512, max(16, triton.next_power_of_2(width)))
    return min(64, RUN_ELEMENTS // cols), cols


@triton.jit
def _has_gradient(token, vocabulary, padding_idx):
    inside = (token >= 0) & (token < vocabulary)
    if padding_idx is not None:
        inside = inside & (token != padding_idx)
    return inside


@triton.jit(do_not_specialize=["count", "vocabulary", "chunk", "padding_idx", "threshold"])
def embedding_backward_kernel(
    dout_ptr,
    tokens_ptr,
    order_ptr,
    seed_ptr,
    dtable_ptr,
    partial_ptr,
    count,
    vocabulary,
    width,
    chunk,
    stride_dout_m,
    padding_idx,
    scale,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (count, ceil(width / BLOCK_N)): a program of a run's first token in a chunk sums the run there; others end.

    tokens_ptr: (count,) sorted; order_ptr: (count,) int64, their rows of dout, in order among equal tokens.
    partial_ptr: (2, chunks, width) float32: what begins a chunk and began before it, and what ends it and goes on.
    """
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + first).to(tl.int64)
    began_before = (first > 0) & (tl.load(tokens_ptr + tl.maximum(first - 1, 0)).to(tl.int64) == token)
    if (began_before & (first % chunk != 0)) | (not _has_gradient(token, vocabulary, padding_idx)):
        return
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    end = tl.minimum((first // chunk + 1) * chunk, count)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    next_m = first
    while next_m < end:
        offs_m = next_m + tl.arange(0, BLOCK_M)
        same = (offs_m < end) & (tl.load(tokens_ptr + offs_m, offs_m < end, 0).to(tl.int64) == token)
        rows = tl.load(order_ptr + offs_m, same, 0)
        mask = same[:, None] & mask_n[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * stride_dout_m + offs_n[None, :], mask, 0.0).to(tl.float32)
        if seed_ptr is not None:
            kept = _triton.kept(tl.load(seed_ptr), threshold, 0, rows, first_n, BLOCK_N)
            dout = tl.where(kept, dout * keep_scale, 0.0)
        sums += dout
        next_m = tl.where(tl.sum(same.to(tl.int32), 0) == BLOCK_M, next_m + BLOCK_M, end)
    total = tl.sum(sums, 0)

    goes_on = (end < count) & (tl.load(tokens_ptr + tl.minimum(end, count - 1)).to(tl.int64) == token)
    if began_before | goes_on:
        chunks = tl.cdiv(count, chunk).to(tl.int64)
        row = first // chunk + tl.where(began_before, 0, chunks)
        tl.store(partial_ptr + row * width + offs_n, total, mask_n)
    else:
        tl.store(dtable_ptr + token * width + offs_n, (total * scale).to(dtable_ptr.dtype.element_ty), mask_n)


@triton.jit(do_not_specialize=["count", "vocabulary", "chunk", "padding_idx"])
def embedding_backward_merge_kernel(
    tokens_ptr,
    partial_ptr,
    dtable_ptr,
    count,
    vocabulary,
    width,
    chunk,
    padding_idx,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (chunks, ceil(width / BLOCK_N)): the program of the chunk in which a run begins that goes on beyond it."""
    number = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(count, chunk).to(tl.int64)
    if number + 1 >= chunks:
        return
    token = tl.load(tokens_ptr + (number + 1) * chunk).to(tl.int64)
    goes_on = tl.load(tokens_ptr + (number + 1) * chunk - 1).to(tl.int64) == token
    before = tl.maximum(number * chunk - 1, 0)
    began_before = (number > 0) & (tl.load(tokens_ptr + before).to(tl.int64) == token)
    if (not goes_on) | began_before | (not _has_gradient(token, vocabulary, padding_idx)):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < width
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    next_m = number + 1
    while next_m < chunks:
        offs_m = next_m + tl.arange(0, BLOCK_M)
        same = (offs_m < chunks) & (tl.load(tokens_ptr + offs_m * chunk, offs_m < chunks, 0).to(tl.int64) == token)
        sums += tl.load(partial_ptr + offs_m[:, None] * width + offs_n[None, :], same[:, None] & mask_n[None, :], 0.0)
        next_m = tl.where(tl.sum(same.to(tl.int32), 0) == BLOCK_M, next_m + BLOCK_M, chunks)
    total = tl.sum(sums, 0) + tl.load(partial_ptr + (chunks + number) * width + offs_n, mask_n, 0.0)
    tl.store(dtable_ptr + token * width + offs_n, (total * scale).to(dtable_ptr.dtype.element_ty), mask_n)
