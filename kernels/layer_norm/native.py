"""What the CPU and CUDA backends of layer norm have in common: outputs, and the arguments of the compiled functions.

csrc/layer_norm/layer_norm.h says what these mean. Each backend passes the compiled function of its device, and for the
backward pass into how many groups the rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_transformer.kernels import _philox
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.memory import empty_result_like


def rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x as rows with a contiguous last axis, and the stride between rows; copied only where x is no such thing."""
    if x is None:
        return None, 0
    if x.is_contiguous():
        return x, x.shape[-1]
    x = dense_last(x).reshape(-1, x.shape[-1])
    return x, x.stride(0)


def forward(
    launch: Callable, x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, keep_total, keep_statistics
):
    cols = x.shape[-1]
    y = empty_result_like(x)
    makes_total = residual is not None or x_bias is not None or seed is not None
    total = empty_result_like(y) if keep_total and makes_total else None
    mean = rstd = None
    if keep_statistics:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        mean = None if rms else torch.empty_like(rstd)

    param_dtype = x.dtype
    if x_bias is not None or weight is not None or bias is not None:
        param_dtype = _common_dtype(x.dtype, x_bias, weight, bias)
        x_bias, weight, bias = (_parameter(p, param_dtype) for p in (x_bias, weight, bias))
    x_rows, x_stride = rows(x)
    residual_rows, residual_stride = rows(residual)
    launch(
        *(x_rows.data_ptr(), x_stride, ptr(residual_rows), residual_stride),
        *(ptr(x_bias), ptr(weight), ptr(bias), ptr(seed)),
        *(y.data_ptr(), ptr(total), ptr(mean), ptr(rstd)),
        *(x.numel() // cols, cols, eps, *_dropout_numbers(seed, dropout_p), rms, DTYPES[x.dtype], DTYPES[param_dtype]),
    )
    return y, total, mean, rstd


def backward(
    launch: Callable, parts: int, dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted
):
    cols = total.shape[-1]
    dx = empty_result_like(total) if wanted.dx else None
    dresidual = None
    if wanted.dresidual:  # where nothing was dropped the two gradients are one tensor
        dresidual = dx if dx is not None and seed is None else empty_result_like(total)
    sums = [total.new_empty(cols, dtype=param_dtype) if want else None for want in wanted[2:]]
    partials = iter(total.new_empty(sum(wanted[2:]), parts, cols, dtype=torch.float32))
    dx_bias_partials, dweight_partials, dbias_partials = (next(partials) if want else None for want in wanted[2:])
    dx_bias, dweight, dbias = sums

    dy_rows, dy_stride = rows(dy)
    dtotal_rows, dtotal_stride = rows(dtotal)
    total_rows, total_stride = rows(total)
    weight = _parameter(weight, param_dtype)
    mean, rstd = (x if x is None else x.contiguous() for x in (mean, rstd))  # where a hook packed what was saved
    launch(
        *(ptr(dy_rows), dy_stride, ptr(dtotal_rows), dtotal_stride, total_rows.data_ptr(), total_stride),
        *(ptr(weight), ptr(mean), ptr(rstd), ptr(seed)),
        *(ptr(dx), 0 if dresidual is dx else ptr(dresidual), ptr(dweight), ptr(dbias), ptr(dx_bias)),
        *(ptr(dweight_partials), ptr(dbias_partials), ptr(dx_bias_partials), parts),
        *(total.numel() // cols, cols, *_dropout_numbers(seed, dropout_p), rms),
        *(DTYPES[total.dtype], DTYPES[param_dtype]),
    )
    return dx, dresidual, *sums


def _common_dtype(dtype: torch.dtype, *parameters: Tensor | None) -> torch.dtype:
    """float32 if one of the parameters is, else `dtype`: a kernel reads all parameters in one type."""
    return torch.float32 if any(p is not None and p.dtype is torch.float32 for p in parameters) else dtype


def _parameter(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return p if p is None or (p.dtype is dtype and p.is_contiguous()) else p.to(dtype).contiguous()


def _dropout_numbers(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (0, 1.0) if seed is None else (_philox.threshold(dropout_p), _philox.keep_scale(dropout_p))
