"""What the CPU and CUDA backends of bias_act have in common: outputs, and the compiled functions' arguments.

csrc/bias_act/bias_act.h says what these mean. Each backend passes the compiled function of its device, and for the
backward pass into how many groups the rows are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_transformer.kernels import _philox
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.bias_act.checks import ACTIVATIONS
from fused_transformer.kernels.memory import empty_result_like


def forward(launch: Callable, x, bias, seed, activation, dropout_p):
    y = empty_result_like(x)
    if not x.numel():
        return y
    x, bias = _rows(x), _dense(bias)
    rows, cols = x.shape
    launch(
        *(ptr(x), x.stride(0), ptr(bias), ptr(seed), ptr(y), rows, cols),
        *(*_dropout_numbers(seed, dropout_p), *_codes(activation, x, bias)),
    )
    return y


def backward(
    launch: Callable, parts: Callable[[Tensor], int],
    dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias,
):  # fmt: skip
    cols = saved.shape[-1]
    dx = empty_result_like(saved) if wants_dx else None
    if not saved.numel():
        return dx, saved.new_zeros(cols, dtype=torch.float32) if wants_dbias else None
    dy, saved, bias = _rows(dy), _rows(saved), _dense(bias)
    groups = parts(saved)
    dbias = saved.new_empty(cols, dtype=torch.float32) if wants_dbias else None
    partial = saved.new_empty(groups, cols, dtype=torch.float32) if wants_dbias else None
    launch(
        *(ptr(dy), dy.stride(0), ptr(saved), saved.stride(0), ptr(bias), ptr(seed)),
        *(ptr(dx), ptr(dbias), ptr(partial), groups, len(saved), cols),
        # ReLU's mask is in y, its scale is not
        *(0 if seed is None else _philox.threshold(dropout_p), _philox.keep_scale(dropout_p)),
        *_codes(activation, saved, bias),
    )
    return dx, dbias


def _rows(x: Tensor) -> Tensor:
    """x as rows with a contiguous last axis; copied only where it is no such thing."""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else dense_last(x).reshape(-1, x.shape[-1])


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _dropout_numbers(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (0, 1.0) if seed is None else (_philox.threshold(dropout_p), _philox.keep_scale(dropout_p))


def _codes(activation: str, x: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    return ACTIVATIONS.index(activation), DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
