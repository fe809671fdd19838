"""Layer norm in Triton, for tensors on a GPU: outputs, tiles and launches.

triton_forward.py and triton_backward.py hold the kernels, and say how the work is cut and what bounds it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fused_transformer.kernels import _triton
from fused_transformer.kernels.layer_norm import triton_backward, triton_forward
from fused_transformer.kernels.layer_norm.native import rows as as_rows


def refuses(x, *_args) -> str | None:
    return _triton.refuses_tensors(x=x)  # the other tensors were checked against x


def forward(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, keep_total, keep_statistics):
    cols = x.shape[-1]
    rows = x.numel() // cols
    y = _dense_like(x)
    makes_total = residual is not None or x_bias is not None or seed is not None
    total = torch.empty_like(y) if keep_total and makes_total else None
    mean = rstd = None
    if keep_statistics:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        mean = None if rms else torch.empty_like(rstd)
    if rows == 0:
        return y, total, mean, rstd

    x_rows, stride_x = as_rows(x)
    residual_rows, stride_residual = as_rows(residual)
    x_bias, weight, bias = (_dense(p) for p in (x_bias, weight, bias))
    inputs = (x_rows, residual_rows, x_bias, weight, bias, seed)
    scalars = (eps, *_triton.dropout_numbers(seed, dropout_p))
    tile = triton_forward.forward_tile(cols)
    with _triton.current(x):
        if cols <= tile.cols:
            triton_forward.layer_norm_forward_kernel[(triton.cdiv(rows, tile.rows),)](
                *(*inputs, y, total, mean, rstd, rows, cols, stride_x, stride_residual, *scalars),
                RMS=rms,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.cols,
                num_warps=tile.warps,
            )
        else:
            written, stride_total = (x_rows, stride_x) if not makes_total else (y if total is None else total, cols)
            triton_forward.layer_norm_forward_wide_kernel[(rows,)](
                *(*inputs, y, written, mean, rstd, cols, stride_x, stride_residual, stride_total, *scalars),
                RMS=rms,
                MAKES_TOTAL=makes_total,
                BLOCK_N=tile.cols,
                num_warps=tile.warps,
            )
    return y, total, mean, rstd


def backward(dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted):
    cols = total.shape[-1]
    rows = total.numel() // cols
    dx = _dense_like(total) if wanted.dx else None
    dresidual = None
    if wanted.dresidual:  # where nothing was dropped the two gradients are one tensor
        dresidual = dx if dx is not None and seed is None else _dense_like(total)
    sums = [total.new_empty(cols, dtype=param_dtype) if want else None for want in wanted[2:]]
    dx_bias, dweight, dbias = sums

    tile = triton_backward.backward_tile(cols, total.element_size())
    parts = triton_backward.parts(rows, cols, tile, _triton.multiprocessors(total.device))
    partials = iter(total.new_empty(sum(wanted[2:]), parts, cols, dtype=torch.float32))
    dx_bias_partials, dweight_partials, dbias_partials = (next(partials) if want else None for want in wanted[2:])

    dy_rows, stride_dy = as_rows(dy)
    dtotal_rows, stride_dtotal = as_rows(dtotal)
    total_rows, stride_total = as_rows(total)
    weight = _dense(weight)
    with _triton.current(total):
        means = None
        if dy is not None and cols > tile.cols:
            means = total.new_empty(2, rows, dtype=torch.float32)
            means_tile = triton_backward.means_tile(cols)
            if rows > 0:
                triton_backward.layer_norm_backward_means_kernel[(rows,)](
                    *(dy_rows, total_rows, weight, mean, rstd, means, rows, cols, stride_dy, stride_total),
                    BLOCK_N=means_tile.cols,
                    num_warps=means_tile.warps,
                    enable_fp_fusion=False,
                )
        triton_backward.layer_norm_backward_kernel[(parts, triton.cdiv(cols, tile.cols))](
            *(dy_rows, dtotal_rows, total_rows, weight, mean, rstd, means, seed),
            *(dx, None if dresidual is dx else dresidual, dweight_partials, dbias_partials, dx_bias_partials),
            *(rows, cols, stride_dy, stride_dtotal, stride_total, *_triton.dropout_numbers(seed, dropout_p)),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.cols,
            num_warps=tile.warps,
            # g - mean(g) must be 0 where they are equal, as they are in rows of one column: fused with the product
            # dy · weight it would be that product's rounding error.
            enable_fp_fusion=False,
        )
        if any(wanted[2:]):
            tile = triton_backward.sums_tile(cols)
            triton_backward.layer_norm_backward_sums_kernel[(triton.cdiv(cols, tile.cols),)](
                *(dweight_partials, dbias_partials, dx_bias_partials, dweight, dbias, dx_bias, parts, cols),
                BLOCK_P=tile.rows,
                BLOCK_N=tile.cols,
                num_warps=tile.warps,
            )
    return dx, dresidual, *sums


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dense(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()
