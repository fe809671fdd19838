"""Residual + LayerNorm in one pass against F.layer_norm(x + residual) and torch.compile of it.

Bytes forward: x and the residual read, y written. With the gradient: also the sum written and read, the upstream
gradient read and dx written (the residual's gradient is the same numbers). Operations forward, an element: the sum,
its mean, the difference and its square, their sum, rstd, weight and bias; backward: the normalised value again (2), the
two sums over the row (4), dx (5), and the sums of dweight and dbias (3).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import packages, shapes
from bench.agreement import forward_backward
from bench.baselines import compiled
from fused_transformer.kernels import add_layer_norm, layer_norm

SHAPES = [shapes.ROWS_BASE, shapes.ROWS_BIG, shapes.ROWS_BASE_BF16, shapes.ROWS_STEP]


def add_then_norm(x, residual, weight, bias):
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias)


def norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def make(shape: shapes.Rows, device: str, grad: bool = False):
    sizes = [(shape.rows, shape.width), (shape.rows, shape.width), (shape.width,), (shape.width,)]
    return tuple(torch.randn(size, device=device).to(shape.dtype).requires_grad_(grad) for size in sizes)


def elements(shape: shapes.Rows) -> int:
    return shape.rows * shape.width


def tensor_bytes(shape: shapes.Rows) -> int:
    return elements(shape) * shape.dtype.itemsize


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_add_layer_norm(compare, shape, device):
    implementations = {"naive": add_then_norm, "fused": add_layer_norm}
    if shape is shapes.ROWS_BASE:
        implementations["compile"] = compiled(add_then_norm)
    implementations |= packages.add_layer_norm(device)
    compare(implementations, make(shape, device), bytes_moved=3 * tensor_bytes(shape), flops=8 * elements(shape))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def bench_add_layer_norm_forward_backward(compare, shape, device):
    implementations = {"naive": forward_backward(add_then_norm), "fused": forward_backward(add_layer_norm)}
    implementations |= packages.add_layer_norm(device, forward_backward)
    work = {"bytes_moved": 7 * tensor_bytes(shape), "flops": (8 + 14) * elements(shape)}
    compare(implementations, make(shape, device, grad=True), **work)


@pytest.mark.parametrize("shape", [shapes.ROWS_BASE], ids=str)
def bench_layer_norm(compare, shape, device):
    x, _, weight, bias = make(shape, device)
    work = {"bytes_moved": 2 * tensor_bytes(shape), "flops": 7 * elements(shape)}
    compare({"naive": norm, "fused": layer_norm}, (x, weight, bias), **work)
