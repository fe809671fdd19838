"""Cross entropy in Triton, for tensors on a GPU.

How the work is cut. Forward, a program takes BLOCK_N rows and walks over the vocabulary in chunks of BLOCK_V, with the
running maximum of online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): the logits are read once, however
long the vocabulary is. Backward, a program takes one chunk of BLOCK_N rows: one read, one write, nothing carried over.

What bounds it: memory. At V = 32,000 in bfloat16 a row is 64 kB to read, and its loss and statistics are 12 bytes.

Sums are taken relative to the row's maximum, so that they hold where the logits are far from 0:

    loss = log Σ exp(x - top) + a (top - x_target) + b Σ (top - x) + z lse²       q(v) = a·[v = target] + b

No term but the first can be negative, and nothing large is subtracted from something large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_transformer.kernels import _triton


@dataclass(frozen=True)
class Config:
    """A program's tile of rows × vocabulary, and its warps."""

    block_n: int
    block_v: int
    warps: int

    def launch(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "num_warps": self.warps}


# Elements of a tile. Forward, 16 a thread of 8 warps: beside the chunk two sums of that size stay in registers, at most
# 80 a thread where loads are wide, so that 3 programs run at once on a multiprocessor: 24 kB or more of loads under way
# in 16 bits, where about 20 kB hide the memory's latency.
FORWARD_TILE, FORWARD_WARPS = 4096, 8
# Backward nothing is carried from chunk to chunk; 16 elements a thread make two or four 16-byte accesses each.
BACKWARD_TILE, BACKWARD_WARPS = 2048, 4


def config(vocabulary: int, tile: int, warps: int) -> Config:
    """A chunk is the whole row where the tile holds it, and the tile then takes as many rows as fit."""
    block_v = min(tile, max(16, triton.next_power_of_2(vocabulary)))
    return Config(tile // block_v, block_v, warps)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_forward_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    top_ptr,
    log_sum_ptr,
    rows,
    V,
    stride_logits_n,
    target_weight,
    every_weight,
    z_loss,
    ignore_index,
    SMOOTHED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid: (tiles of rows,). Losses, and of each row its maximum and log Σ exp(x - maximum)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < rows
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    counts = mask_n & (target != ignore_index)
    inside = counts & (target >= 0) & (target < V)
    row_ptr = logits_ptr + offs_n * stride_logits_n
    at_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)

    offs_v = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)  # top, or 0 as long as there is nothing but -inf
    exps = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # summed column by column: Σ exp(x - shift)
    gaps = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # likewise Σ (shift - x)
    chunks = 0.0
    end = tl.max(counts.to(tl.int32), 0) * V  # ignored rows alone: nothing is read
    for start in range(0, end, BLOCK_V):
        mask_v = start + offs_v < V
        mask = counts[:, None] & mask_v[None, :]
        x = tl.load(row_ptr[:, None] + (start + offs_v)[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        new_shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        exps = exps * tl.exp(top - new_shift)[:, None] + tl.exp(x - new_shift[:, None])
        if SMOOTHED:
            gap = tl.where(mask_v[None, :], new_shift[:, None] - x, 0.0)
            gaps += chunks * (new_shift - shift)[:, None] + gap
            chunks += 1.0
        top, shift = new_top, new_shift

    log_sum = tl.log(tl.sum(exps, 1))
    lse = top + log_sum
    loss = log_sum + lse * (z_loss * lse)
    loss += tl.where(target_weight == 0.0, 0.0, target_weight * (top - at_target))
    if SMOOTHED:
        loss += every_weight * tl.sum(gaps, 1)
    loss = tl.where(inside, loss, tl.where(counts, float("nan"), 0.0))
    tl.store(losses_ptr + offs_n, loss, mask=mask_n)
    tl.store(top_ptr + offs_n, top, mask=mask_n)
    tl.store(log_sum_ptr + offs_n, log_sum, mask=mask_n)


@triton.jit(do_not_specialize=["rows", "ignore_index", "stride_dlosses_n"])
def cross_entropy_backward_kernel(
    dlosses_ptr,
    logits_ptr,
    targets_ptr,
    top_ptr,
    log_sum_ptr,
    dlogits_ptr,
    rows,
    V,
    stride_dlosses_n,
    stride_logits_n,
    stride_dlogits_n,
    target_weight,
    every_weight,
    z_loss,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid: (tiles of rows · chunks,), the chunks of a row side by side, as they lie in memory.

    dlogits = dloss · (p (1 + 2 z lse) - b - a·[v = target]); dlogits may be logits.
    """
    chunks = tl.cdiv(V, BLOCK_V)
    pid_n, pid_v = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    mask_n = offs_n < rows
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    counts = mask_n & (target != ignore_index)
    inside = counts & (target >= 0) & (target < V)
    dloss = tl.load(dlosses_ptr + offs_n * stride_dlosses_n, mask=inside, other=float("nan")).to(tl.float32)
    top = tl.load(top_ptr + offs_n, mask=counts, other=0.0)
    log_sum = tl.load(log_sum_ptr + offs_n, mask=counts, other=0.0)

    mask_v = (offs_v < V)[None, :]
    tile_ptr = logits_ptr + offs_n[:, None] * stride_logits_n + offs_v[None, :]
    x = tl.load(tile_ptr, mask=counts[:, None] & mask_v, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_V]
    dx = tl.exp((x - top[:, None]) - log_sum[:, None]) * (1.0 + 2.0 * z_loss * (top + log_sum))[:, None]
    dx -= every_weight
    dx -= tl.where(offs_v[None, :] == target[:, None], target_weight, 0.0)
    dx = tl.where(counts[:, None], dloss[:, None] * dx, 0.0)
    out_ptr = dlogits_ptr + offs_n[:, None] * stride_dlogits_n + offs_v[None, :]
    tl.store(out_ptr, dx.to(dlogits_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_v)


def refuses(logits, *_args) -> str | None:
    return _triton.refuses_tensors(logits=logits)


def forward(logits, targets, target_weight, every_weight, z_loss, ignore_index):
    rows, vocabulary = logits.shape
    losses, top, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    targets = targets.contiguous()
    if rows:
        chosen = config(vocabulary, FORWARD_TILE, FORWARD_WARPS)
        with _triton.current(logits):
            cross_entropy_forward_kernel[(triton.cdiv(rows, chosen.block_n),)](
                *(logits, targets, losses, top, log_sum),
                *(rows, vocabulary, logits.stride(0)),
                *(target_weight, every_weight, z_loss, ignore_index),
                SMOOTHED=every_weight > 0.0,
                **chosen.launch(),
            )
    return losses, top, log_sum


def backward(dlosses, logits, targets, top, log_sum, target_weight, every_weight, z_loss, ignore_index, inplace):
    rows, vocabulary = logits.shape
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    targets = targets.contiguous()
    if rows:
        chosen = config(vocabulary, BACKWARD_TILE, BACKWARD_WARPS)
        programs = triton.cdiv(rows, chosen.block_n) * triton.cdiv(vocabulary, chosen.block_v)
        with _triton.current(logits):
            cross_entropy_backward_kernel[(programs,)](
                *(dlosses, logits, targets, top, log_sum, dlogits),
                *(rows, vocabulary, dlosses.stride(0), logits.stride(0), dlogits.stride(0)),
                *(target_weight, every_weight, z_loss, ignore_index),
                **chosen.launch(),
            )
    return dlogits
