"""Bias, activation and dropout in CUDA C++, for tensors on a GPU; see csrc/bias_act."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _cuda, _philox
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.bias_act.checks import ACTIVATIONS

_C = _cuda.library()

# The sums over rows are taken by about this many blocks a multiprocessor: as many as run at once, with 128 threads of
# up to 96 registers. Each group of rows costs F floats of traffic, written and read again, so a group has some rows.
BLOCKS_PER_MULTIPROCESSOR = 5
STRIP_BYTES = 2048  # of the columns of a block: 128 threads, 16 bytes each
FEWEST_ROWS = 8


def refuses(x, *_args) -> str | None:
    return _cuda.refuses_tensors(x=x)  # the bias was checked against x


def forward(x, bias, seed, activation, dropout_p):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return y
    x, bias = _rows(x), _dense(bias)
    rows, cols = x.shape
    with _cuda.current(x):
        _cuda.on_current_stream(_C.bias_act_forward_cuda, x)(
            *(ptr(x), x.stride(0), ptr(bias), ptr(seed), ptr(y), rows, cols),
            *(*_dropout_numbers(seed, dropout_p), *_codes(activation, x, bias)),
        )
    return y


def backward(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias):
    cols = saved.shape[-1]
    dx = torch.empty_like(saved, memory_format=torch.contiguous_format) if wants_dx else None
    if not saved.numel():
        return dx, saved.new_zeros(cols, dtype=torch.float32) if wants_dbias else None
    dy, saved, bias = _rows(dy), _rows(saved), _dense(bias)
    parts = _parts(saved)
    dbias = saved.new_empty(cols, dtype=torch.float32) if wants_dbias else None
    partial = saved.new_empty(parts, cols, dtype=torch.float32) if wants_dbias else None
    with _cuda.current(saved):
        _cuda.on_current_stream(_C.bias_act_backward_cuda, saved)(
            *(ptr(dy), dy.stride(0), ptr(saved), saved.stride(0), ptr(bias), ptr(seed)),
            *(ptr(dx), ptr(dbias), ptr(partial), parts, len(saved), cols),
            # ReLU's mask is in y, its scale is not
            *(0 if seed is None else _philox.threshold(dropout_p), _philox.keep_scale(dropout_p)),
            *_codes(activation, saved, bias),
        )
    return dx, dbias


def _parts(x: Tensor) -> int:
    rows, cols = x.shape
    strips = -(-cols * x.element_size() // STRIP_BYTES)
    at_once = BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(x.device)
    return max(1, min(-(-rows // FEWEST_ROWS), at_once // strips))


def _rows(x: Tensor) -> Tensor:
    """x as rows with a contiguous last axis; copied only where it is no such thing."""
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else dense_last(x).reshape(-1, x.shape[-1])


def _dense(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.is_contiguous() else bias.contiguous()


def _dropout_numbers(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (0, 1.0) if seed is None else (_philox.threshold(dropout_p), _philox.keep_scale(dropout_p))


def _codes(activation: str, x: Tensor, bias: Tensor | None) -> tuple[int, int, int]:
    return ACTIVATIONS.index(activation), DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
