"""Bias, activation and dropout in Triton, for tensors on a GPU.

How the work is cut. Forward, a program takes one tile of rows × columns. Backward, a program takes a strip of columns
and every groups-th tile of rows in it, sums the gradients of the bias over them in registers, and writes one row of
partial sums; the groups' rows are added up at the end, in a fixed order. There are as many groups as run at once.

What bounds it: memory. Forward x is read and y written; backward dy and one of x and y are read and dx is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_transformer.kernels import _philox, _triton
from fused_transformer.kernels._checks import dense_last

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)  # 1/√(2π)
TWICE_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2 √(2/π)
CUBIC, CUBIC_SLOPE = tl.constexpr(0.044715), tl.constexpr(3 * 0.044715)


@dataclass(frozen=True)
class Config:
    """A program's tile of rows × columns, and its warps."""

    block_m: int
    block_f: int
    warps: int

    def launch(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_F": self.block_f, "num_warps": self.warps}


# 16 elements a thread: two or four 16-byte accesses under way for each tensor read, with at most 128 registers. Columns
# are few backward, so that even F = 2048 makes four strips, and the sums over rows need not be spread over many groups
# (each costs F floats, written and read).
TILE, WARPS = 2048, 4
FORWARD_COLUMNS, BACKWARD_COLUMNS = 1024, 512
PROGRAMS_PER_MULTIPROCESSOR = 4  # backward; all run at once with 128 registers, 32 kB or more of loads under way


def config(cols: int, widest: int) -> Config:
    block_f = min(widest, max(16, triton.next_power_of_2(cols)))
    return Config(TILE // block_f, block_f, WARPS)


@triton.jit
def tanh_parts(h):
    """(1 + tanh u) / 2 and its derivative by 2u, of gelu_tanh's u = √(2/π) (h + 0.044715 h³).

    The first is the logistic function of 2u. From exp(-|2u|) neither overflows nor is made of a difference.
    """
    twice_u = (h + h * h * h * CUBIC) * TWICE_SQRT_2_PI
    small = tl.exp(-tl.abs(twice_u))
    inverse = 1.0 / (1.0 + small)
    return tl.where(twice_u < 0.0, small, 1.0) * inverse, small * inverse * inverse


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(h <= 0.0, 0.0, h)  # NaN stays NaN, as torch's
    elif ACTIVATION == "gelu":
        y = 0.5 * h * (1.0 + tl.erf(h * SQRT_HALF))
    else:
        share, _ = tanh_parts(h)
        y = h * share
    return y


@triton.jit
def gelu_derivative(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(h * SQRT_HALF)) + h * tl.exp(-0.5 * h * h) * INV_SQRT_2PI
    else:
        share, slope = tanh_parts(h)
        d = share + h * slope * (1.0 + h * h * CUBIC_SLOPE) * TWICE_SQRT_2_PI
    return d


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_forward_kernel(
    x_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    rows,
    F,
    stride_x_m,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: (tiles of rows · strips of columns,), the tiles of a row side by side."""
    strips = tl.cdiv(F, BLOCK_F)
    pid_m, pid_f = tl.program_id(0) // strips, tl.program_id(0) % strips
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask = (offs_m < rows)[:, None] & (offs_f < F)[None, :]
    h = tl.load(x_ptr + offs_m[:, None] * stride_x_m + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        h += tl.load(bias_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)[None, :]
    y = activated(h, ACTIVATION)  # [BLOCK_M, BLOCK_F]
    if DROPS:
        keep = _triton.kept(tl.load(seed_ptr), threshold, 0, offs_m, pid_f * BLOCK_F, BLOCK_F)
        y = tl.where(keep, y * keep_scale, 0.0)
    tl.store(y_ptr + offs_m[:, None] * F + offs_f[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "groups", "threshold"])
def bias_act_backward_kernel(
    dy_ptr,
    saved_ptr,
    bias_ptr,
    seed_ptr,
    dx_ptr,
    partials_ptr,
    rows,
    F,
    groups,
    stride_dy_m,
    stride_saved_m,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    WANTS_DX: tl.constexpr,
    WANTS_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Grid: (groups · strips of columns,). saved is y for ReLU and x for GELU; partials: (groups, F) float32."""
    strips = tl.cdiv(F, BLOCK_F)
    pid_m, pid_f = tl.program_id(0) // strips, tl.program_id(0) % strips
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    if DROPS:
        seed = tl.load(seed_ptr)
    dbias = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for tile in range(pid_m, tl.cdiv(rows, BLOCK_M), groups):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)  # [BLOCK_M]
        mask = (offs_m < rows)[:, None] & mask_f[None, :]
        dx = tl.load(dy_ptr + offs_m[:, None] * stride_dy_m + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        saved_tile_ptr = saved_ptr + offs_m[:, None] * stride_saved_m + offs_f[None, :]
        saved = tl.load(saved_tile_ptr, mask=mask, other=0.0).to(tl.float32)
        dx *= keep_scale
        if ACTIVATION == "relu":
            dx = tl.where(saved <= 0.0, 0.0, dx)
        else:
            if DROPS:
                dx = tl.where(_triton.kept(seed, threshold, 0, offs_m, pid_f * BLOCK_F, BLOCK_F), dx, 0.0)
            if HAS_BIAS:
                saved += bias
            dx *= gelu_derivative(saved, ACTIVATION)
        if WANTS_DX:
            tl.store(dx_ptr + offs_m[:, None] * F + offs_f[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WANTS_DBIAS:
            dbias += dx  # 0 beyond the edges, as dy is there
    if WANTS_DBIAS:
        tl.store(partials_ptr + pid_m.to(tl.int64) * F + offs_f, tl.sum(dbias, 0), mask=mask_f)


def refuses(x, *_args) -> str | None:
    return _triton.refuses_tensors(x=x)  # the bias was checked against x


def forward(x, bias, seed, activation, dropout_p):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        x, cols = _rows(x), x.shape[-1]
        chosen = config(cols, FORWARD_COLUMNS)
        programs = triton.cdiv(len(x), chosen.block_m) * triton.cdiv(cols, chosen.block_f)
        with _triton.current(x):
            bias_act_forward_kernel[(programs,)](
                *(x, _dense(bias), seed, y),
                *(len(x), cols, x.stride(0), *_triton.dropout_numbers(seed, dropout_p)),
                ACTIVATION=activation,
                HAS_BIAS=bias is not None,
                DROPS=seed is not None,
                **chosen.launch(),
            )
    return y


def backward(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias):
    cols = saved.shape[-1]
    dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if wants_dx else None
    if not saved.numel():
        return dx, saved.new_zeros(cols, dtype=torch.float32) if wants_dbias else None
    dy, saved = _rows(dy), _rows(saved)
    chosen = config(cols, BACKWARD_COLUMNS)
    strips = triton.cdiv(cols, chosen.block_f)
    at_once = PROGRAMS_PER_MULTIPROCESSOR * _triton.multiprocessors(saved.device)
    groups = min(triton.cdiv(len(saved), chosen.block_m), triton.cdiv(at_once, strips))
    partials = saved.new_empty(groups, cols, dtype=torch.float32) if wants_dbias else None
    threshold, keep_scale = _triton.dropout_numbers(seed, dropout_p)
    if activation == "relu":  # the mask is in y, the scale is not
        keep_scale = _philox.keep_scale(dropout_p)
    with _triton.current(saved):
        bias_act_backward_kernel[(groups * strips,)](
            *(dy, saved, _dense(bias), seed, dx, partials),
            *(len(saved), cols, groups, dy.stride(0), saved.stride(0)),
            *(threshold, keep_scale),
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            DROPS=seed is not None,
            WANTS_DX=wants_dx,
            WANTS_DBIAS=wants_dbias,
            **chosen.launch(),
        )
    return dx, partials.sum(0) if wants_dbias else None


def _rows(x: Tensor) -> Tensor:
    """x as rows with a contiguous last axis; copied only where it is no such thing."""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else dense_last(x).reshape(-1, x.shape[-1])


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()
