"""Products of float32 matrices on the CPU, for processors that torch's own leave half unused; see csrc/linear/matmul.h.

    linear      y = x Wᵀ + b, with gradients: dx = dy W, dW = dyᵀ x, db = Σ dy over the rows
    product     y = x wᵀ + bias + addend of matrices

What bounds them: the multiply-adds, 2 M N K operations, and 4 M N K more with gradients. Sums are float32, of 256
products at a time. A row of y has the same bits in any batch.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._checks import PLAIN_TYPES
from fused_transformer.kernels._compile import routed

# FUSED_TRANSFORMER_MATMUL: "own" or "torch" whatever the processor.
SETTING = os.environ.get("FUSED_TRANSFORMER_MATMUL", "")
if SETTING not in ("", "own", "torch"):
    raise ValueError(f"FUSED_TRANSFORMER_MATMUL must be own or torch, got {SETTING}")
# Whether torch's products are the slower ones on this processor.
QUICKER = _native.available() and SETTING != "torch" and (SETTING == "own" or _native.library().matmul_is_quicker())

LEAST = 2**21  # multiply-adds: fewer take less time than the calls around them
LEAST_ROWS = 16  # of x: the weights are put in order for the product, which fewer rows do not pay for


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` is the one to call, and not torch's: eager, in float32, on the CPU, and large enough."""
    if not QUICKER or torch.compiler.is_compiling() or x.dtype != torch.float32 or x.numel() * weight.shape[0] < LEAST:
        return False
    return (
        _is_matrix(weight, 2)
        and _is_matrix(x, None)
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and (bias is None or (_is_matrix(bias, 1) and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
        and not routed(x)
    )


def _is_matrix(x: Tensor, dim: int | None) -> bool:
    right = type(x) in PLAIN_TYPES and x.device.type == "cpu" and x.dtype == torch.float32
    return right and x.layout == torch.strided and (dim is None or x.dim() == dim)


def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """x wᵀ + bias, of x (M, K), w (N, K) and bias (N,), all float32; into `out` (M, N; dense rows), or added to it."""
    (M, K), N = x.shape, w.shape[0]
    y = x.new_empty(M, N) if out is None else out
    if K == 0:
        x, w, K = x.new_zeros(M, 1), w.new_zeros(N, 1), 1
    bias = None if bias is None else bias.contiguous()
    (x, left), (w, right), rows = _matrix(x), _matrix(w), (y.data_ptr(), y.stride(0))
    _native.library().matmul((M, N, K), left, right, _native.ptr(bias), rows if add else (0, 0), rows)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear: x (..., K), weight (N, K), bias (N,), if `takes` says so."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return product(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(_rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, dy_rows = _rows(x), _rows(dy)
        dx = dweight = dbias = None
        again = torch.is_grad_enabled()  # for gradients of gradients: by operations that have them
        if ctx.needs_input_grad[0]:
            dx = (dy_rows @ weight if again else product(dy_rows, weight.t())).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = dy_rows.t() @ rows if again else product(dy_rows.t(), rows.t())
        if ctx.needs_input_grad[2]:
            dbias = dy_rows.sum(0)
        return dx, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _matrix(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x, or a copy of it, with contiguous rows or columns; and its address and strides."""
    if x.stride(0) != 1 and x.stride(1) != 1 and min(x.shape) > 1:
        x = x.contiguous()
    row, column = x.stride()
    if x.shape[1] == 1:  # one column is contiguous rows, whatever its stride
        column = 1
    elif x.shape[0] == 1 and column != 1:
        row = 1
    return x, (x.data_ptr(), row, column)
