"""Layer norm forward in Triton: the kernels, and the table of their tiles.

A program holds whole rows of the sum in registers and passes over memory once: 2 E s bytes, 3 with a residual, 4 where
the sum is kept (E elements of s bytes); bound by memory. Above HELD_COLUMNS a row is read in blocks of columns, three
times: to make the sum, for the variance and for y. The second and the third time it comes out of the cache, as a row is
some 100 KB and few rows are under way at once: 2 E s more from there, and 1 more to it where the sum is made but not
kept, since it is then written to where y will be.

The variance is summed around the mean, and what rounding left of the mean is taken off again: one reduction more, and
the result holds where |mean| >> std.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fused_transformer.kernels import _triton


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a program's tile (powers of two), and the warps that share it."""

    rows: int
    cols: int
    warps: int


# A row of this many columns is held in registers.
HELD_COLUMNS = 16384


def forward_tile(cols: int) -> Tile:
    """Chosen by the width alone: what a row gives must not depend on how many rows there are."""
    width = max(16, triton.next_power_of_2(cols))
    if width <= 1024:
        # One warp: sums over a row are shuffles, without a barrier. 32 elements a thread are 4 loads of 16 bytes in
        # flight for each of x and residual (bfloat16), from as many warps as a multiprocessor takes.
        return Tile(max(1, 1024 // width), width, 1)
    if width <= HELD_COLUMNS:
        return Tile(1, width, max(4, width // 1024))  # 32 elements a thread, as above
    return Tile(1, 8192, 16)  # a block of columns: 16 elements a thread, for it is read three times


@triton.jit
def _total(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    seed_ptr,
    offs_m,
    offs_n,
    first_n,
    mask,
    cols,
    stride_x_m,
    stride_residual_m,
    threshold,
    keep_scale,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of x's dtype: residual + dropout(x + x_bias), 0 where mask is false."""
    x = tl.load(x_ptr + offs_m[:, None] * stride_x_m + offs_n[None, :], mask, 0.0)
    total = x.to(tl.float32)
    if x_bias_ptr is not None:
        total += tl.load(x_bias_ptr + offs_n, offs_n < cols, 0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        kept = _triton.kept(tl.load(seed_ptr), threshold, 0, offs_m, first_n, BLOCK_N)
        total = tl.where(kept, total * keep_scale, 0.0)  # a product with 0 would leave NaN and infinity NaN
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :], mask, 0.0)
        total += residual.to(tl.float32)
    return total.to(x.dtype)


@triton.jit
def _rstd(squares, rest, cols, eps):
    """1 / √(var + eps), and what rounding left of the mean, out of the sums of (total - mean)² and of total - mean."""
    count = tl.cast(cols, tl.float32)
    correction = tl.div_rn(rest, count)
    variance = tl.div_rn(squares, count) - correction * correction
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), correction


@triton.jit
def _affine(total, mean, correction, rstd, weight_ptr, bias_ptr, offs_n, cols):
    """[BLOCK_M, BLOCK_N] float32: ((total - mean) - correction) · rstd · weight + bias."""
    y = (total - mean[:, None]) * rstd[:, None] - (correction * rstd)[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_n, offs_n < cols, 0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, offs_n < cols, 0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["rows", "threshold"])
def layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    cols,
    stride_x_m,
    stride_residual_m,
    eps,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (ceil(rows / BLOCK_M),): a program takes BLOCK_M rows; BLOCK_N >= cols. Outputs lie dense."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows
    mask_n = (offs_n < cols)[None, :]
    mask = mask_m[:, None] & mask_n
    kept_total = _total(
        *(x_ptr, residual_ptr, x_bias_ptr, seed_ptr, offs_m, offs_n, 0, mask, cols),
        *(stride_x_m, stride_residual_m, threshold, keep_scale, BLOCK_N),
    )
    dense = offs_m[:, None] * cols + offs_n[None, :]
    if total_ptr is not None:
        tl.store(total_ptr + dense, kept_total, mask)

    total = kept_total.to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if RMS:
        mean = tl.zeros([BLOCK_M], tl.float32)
        centred = tl.where(mask_n, total, 0.0)
        rest = mean
    else:
        mean = tl.div_rn(tl.sum(total, 1), tl.cast(cols, tl.float32))  # [BLOCK_M]
        centred = tl.where(mask_n, total - mean[:, None], 0.0)
        rest = tl.sum(centred, 1)
    rstd, correction = _rstd(tl.sum(centred * centred, 1), rest, cols, eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean + correction, mask_m)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + offs_m, rstd, mask_m)
    y = _affine(total, mean, correction, rstd, weight_ptr, bias_ptr, offs_n, cols)
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["threshold"])
def layer_norm_forward_wide_kernel(
    x_ptr,
    residual_ptr,
    x_bias_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    cols,
    stride_x_m,
    stride_residual_m,
    stride_total_m,
    eps,
    threshold,
    keep_scale,
    RMS: tl.constexpr,
    MAKES_TOTAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (rows,): a program takes a row, BLOCK_N columns at a time.

    total_ptr: if MAKES_TOTAL, where the sum is written (where it is kept, or y_ptr); else x_ptr.
    """
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    arange_n = tl.arange(0, BLOCK_N)
    dense = offs_m[:, None] * cols
    total_row = offs_m[:, None] * stride_total_m

    mean = tl.zeros([1], tl.float32)
    if MAKES_TOTAL or not RMS:
        sums = tl.zeros([1, BLOCK_N], tl.float32)
        for first_n in range(0, cols, BLOCK_N):
            offs_n = first_n + arange_n
            mask = (offs_n < cols)[None, :]
            total = _total(
                *(x_ptr, residual_ptr, x_bias_ptr, seed_ptr, offs_m, offs_n, first_n, mask, cols),
                *(stride_x_m, stride_residual_m, threshold, keep_scale, BLOCK_N),
            )
            if MAKES_TOTAL:
                tl.store(total_ptr + total_row + offs_n[None, :], total, mask)
            sums += total.to(tl.float32)
        if not RMS:
            mean = tl.div_rn(tl.sum(sums, 1), tl.cast(cols, tl.float32))
        if MAKES_TOTAL:
            tl.debug_barrier()  # other threads than those that wrote the sum may read it below

    rests = tl.zeros([1, BLOCK_N], tl.float32)
    squares = tl.zeros([1, BLOCK_N], tl.float32)
    for first_n in range(0, cols, BLOCK_N):
        offs_n = first_n + arange_n
        mask = (offs_n < cols)[None, :]
        total = tl.load(total_ptr + total_row + offs_n[None, :], mask, 0.0).to(tl.float32)
        centred = tl.where(mask, total - mean[:, None], 0.0)
        rests += centred
        squares += centred * centred
    rest = tl.zeros([1], tl.float32) if RMS else tl.sum(rests, 1)
    rstd, correction = _rstd(tl.sum(squares, 1), rest, cols, eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean + correction)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + offs_m, rstd)

    for first_n in range(0, cols, BLOCK_N):
        offs_n = first_n + arange_n
        mask = (offs_n < cols)[None, :]
        total = tl.load(total_ptr + total_row + offs_n[None, :], mask, 0.0).to(tl.float32)
        y = _affine(total, mean, correction, rstd, weight_ptr, bias_ptr, offs_n, cols)
        tl.store(y_ptr + dense + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask)
