"""Layer norm backward in Triton: the kernels, and the table of their tiles.

With g = dy · weight, n = (total - mean) · rstd and means over the row:

    dresidual = rstd · (g - mean(g) - n · mean(g · n)) + dtotal        (RMS norm: without mean(g))
    dx        = dresidual · dropout's factor
    dweight   = sum over rows of dy · n,  dbias = sum of dy,  dx_bias = sum of dx

A program goes from tile to tile of rows, all of whose columns it holds in registers, and sums its part of the last
three in registers too; at the end it writes one row of partial sums, zeros if it met no row. A second kernel adds up
those rows. No atomics, and the tiles of a program follow from the number of programs: the same bits on every run.

It moves 3 E s bytes, 4 with dropout or with a gradient of total (E elements of s bytes), and 8 bytes for each element
of the partial sums; bound by memory. Above HELD_COLUMNS the columns are shared out among programs, and the two means
of each row are taken by a kernel of their own before, which reads dy and total once more: 2 E s on top.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from fused_transformer.kernels.layer_norm.triton_forward import Tile

# A row of this many columns is held in registers.
HELD_COLUMNS = 8192
# Warps that sum over rows, a multiprocessor: 16 of up to 128 registers a thread run at once. Each program that they
# make up costs 8 bytes a column of every sum.
WARPS_PER_MULTIPROCESSOR = 16


def backward_tile(cols: int, itemsize: int) -> Tile:
    """Chosen by the width and the dtype alone, as forward's by the width."""
    width = max(16, triton.next_power_of_2(cols))
    if width <= 2048:
        # 32 bytes of dy and of total a thread. Twice that took 220 registers, which leaves room for 8 warps, not 16.
        return Tile(max(1, 8192 // (width * itemsize)), width, 8)
    if width <= 4096:
        return Tile(1, width, 16)  # 8 warps took 140 registers
    if width <= HELD_COLUMNS:
        return Tile(1, width, 8)  # 255 registers (sm_100: and 32 bytes spilled); 16 warps have 128, and spill more
    return Tile(2, 2048, 8)  # a block of columns: 16 elements of each a thread, as in narrow rows


def parts(rows: int, cols: int, tile: Tile, multiprocessors: int) -> int:
    """How many programs share the rows, which is how many partial sums there are; at least one, to write zeros."""
    at_once = WARPS_PER_MULTIPROCESSOR // tile.warps * multiprocessors
    return max(1, min(triton.cdiv(rows, tile.rows), at_once // triton.cdiv(cols, tile.cols)))


def means_tile(cols: int) -> Tile:
    """For the means of rows above HELD_COLUMNS: one row, a block of columns at a time."""
    return Tile(1, 4096, 8)


def sums_tile(cols: int) -> Tile:
    """For the sums over parts: 2048 elements of each at a time; few columns a program, so that many run at once."""
    width = min(256, max(16, triton.next_power_of_2(cols) // 64))
    return Tile(2048 // width, width, 4)


@triton.jit
def _normal(total_ptr, mean_ptr, rstd, offs_m, offs_n, mask_m, mask, stride_total_m):
    """[BLOCK_M, BLOCK_N] float32: (total - mean) · rstd, 0 where mask is false."""
    total = tl.load(total_ptr + offs_m[:, None] * stride_total_m + offs_n[None, :], mask, 0.0).to(tl.float32)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + offs_m, mask_m, 0.0)
        total = tl.where(mask, total - mean[:, None], 0.0)
    return total * rstd[:, None]


@triton.jit
def _dy(dy_ptr, offs_m, offs_n, mask, stride_dy_m):
    """[BLOCK_M, BLOCK_N] float32, 0 where mask is false."""
    return tl.load(dy_ptr + offs_m[:, None] * stride_dy_m + offs_n[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _weight(weight_ptr, offs_n, cols, BLOCK_N: tl.constexpr):
    """[BLOCK_N] float32; 1 where there is none."""
    if weight_ptr is not None:
        return tl.load(weight_ptr + offs_n, offs_n < cols, 0.0).to(tl.float32)
    else:
        return tl.full([BLOCK_N], 1.0, tl.float32)


@triton.jit(do_not_specialize=["rows", "threshold"])
def layer_norm_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    seed_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_bias_ptr,
    rows,
    cols,
    stride_dy_m,
    stride_dtotal_m,
    stride_total_m,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (parts, blocks of columns): a program takes BLOCK_N columns of every parts-th tile of BLOCK_M rows.

    means_ptr: (2, rows) float32, the means of g and of g · n; None, if BLOCK_N >= cols: they are taken here.
    mean_ptr: None for RMS norm. dweight_ptr, dbias_ptr, dx_bias_ptr: (parts, cols) float32, partial sums.
    What is None is not given, or not wanted; without dy dweight and dbias are not wanted. Outputs lie dense.
    """
    part = tl.program_id(0).to(tl.int64)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < cols
    weight = _weight(weight_ptr, offs_n, cols, BLOCK_N)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    dx_bias = tl.zeros([BLOCK_N], tl.float32)

    for first_m in range(part * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        mask = mask_m[:, None] & mask_n[None, :]
        dense = offs_m[:, None] * cols + offs_n[None, :]
        d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if dy_ptr is not None:
            rstd = tl.load(rstd_ptr + offs_m, mask_m, 0.0)
            normal = _normal(total_ptr, mean_ptr, rstd, offs_m, offs_n, mask_m, mask, stride_total_m)
            dy = _dy(dy_ptr, offs_m, offs_n, mask, stride_dy_m)
            if dweight_ptr is not None:
                dweight += tl.sum(dy * normal, 0)
            if dbias_ptr is not None:
                dbias += tl.sum(dy, 0)
            g = dy * weight[None, :]
            if means_ptr is None:
                mean_gn = tl.div_rn(tl.sum(g * normal, 1), tl.cast(cols, tl.float32))
            else:
                mean_gn = tl.load(means_ptr + rows + offs_m, mask_m, 0.0)
            if mean_ptr is not None:
                if means_ptr is None:
                    mean_g = tl.div_rn(tl.sum(g, 1), tl.cast(cols, tl.float32))
                else:
                    mean_g = tl.load(means_ptr + offs_m, mask_m, 0.0)
                g -= mean_g[:, None]
            d = (g - normal * mean_gn[:, None]) * rstd[:, None]
        if dtotal_ptr is not None:
            d += tl.load(dtotal_ptr + offs_m[:, None] * stride_dtotal_m + offs_n[None, :], mask, 0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + dense, d.to(dresidual_ptr.dtype.element_ty), mask)
        if seed_ptr is not None:
            kept = _triton.kept(tl.load(seed_ptr), threshold, 0, offs_m, first_n, BLOCK_N)
            d = tl.where(kept, d * keep_scale, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + dense, d.to(dx_ptr.dtype.element_ty), mask)
        if dx_bias_ptr is not None:
            dx_bias += tl.sum(tl.where(mask_m[:, None], d, 0.0), 0)

    partial = part * cols + offs_n
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, dbias, mask_n)
    if dx_bias_ptr is not None:
        tl.store(dx_bias_ptr + partial, dx_bias, mask_n)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_means_kernel(
    dy_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    means_ptr,
    rows,
    cols,
    stride_dy_m,
    stride_total_m,
    BLOCK_N: tl.constexpr,
):
    """grid (rows,): mean(g) and mean(g · n) of a row into means_ptr, (2, rows) float32."""
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + offs_m)
    sums_g = tl.zeros([1, BLOCK_N], tl.float32)
    sums_gn = tl.zeros([1, BLOCK_N], tl.float32)
    for first_n in range(0, cols, BLOCK_N):
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask = (offs_n < cols)[None, :]
        g = _dy(dy_ptr, offs_m, offs_n, mask, stride_dy_m) * _weight(weight_ptr, offs_n, cols, BLOCK_N)[None, :]
        sums_g += g
        sums_gn += g * _normal(total_ptr, mean_ptr, rstd, offs_m, offs_n, offs_m < rows, mask, stride_total_m)
    tl.store(means_ptr + offs_m, tl.div_rn(tl.sum(sums_g, 1), tl.cast(cols, tl.float32)))
    tl.store(means_ptr + rows + offs_m, tl.div_rn(tl.sum(sums_gn, 1), tl.cast(cols, tl.float32)))


@triton.jit
def _add_part(sums, partial_ptr, offsets, mask):
    """sums + a tile of partial sums; as it is where there are none."""
    if partial_ptr is not None:
        sums += tl.load(partial_ptr + offsets, mask, 0.0)
    return sums


@triton.jit
def _store_sum(sums, out_ptr, offs_n, mask_n):
    if out_ptr is not None:
        tl.store(out_ptr + offs_n, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), mask_n)


@triton.jit(do_not_specialize=["parts"])
def layer_norm_backward_sums_kernel(
    dweight_partial_ptr,
    dbias_partial_ptr,
    dx_bias_partial_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_bias_ptr,
    parts,
    cols,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (ceil(cols / BLOCK_N),): each (cols,) output wanted is the sum over rows of its (parts, cols) float32."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < cols
    dweight = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    dx_bias = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first_p in range(0, parts, BLOCK_P):
        offs_p = first_p + tl.arange(0, BLOCK_P)
        mask = (offs_p < parts)[:, None] & mask_n[None, :]
        offsets = offs_p.to(tl.int64)[:, None] * cols + offs_n[None, :]
        dweight = _add_part(dweight, dweight_partial_ptr, offsets, mask)
        dbias = _add_part(dbias, dbias_partial_ptr, offsets, mask)
        dx_bias = _add_part(dx_bias, dx_bias_partial_ptr, offsets, mask)
    _store_sum(dweight, dweight_ptr, offs_n, mask_n)
    _store_sum(dbias, dbias_ptr, offs_n, mask_n)
    _store_sum(dx_bias, dx_bias_ptr, offs_n, mask_n)
