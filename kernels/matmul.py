"""Products of matrices on the CPU, for processors that torch's own leave half unused; see csrc/linear/matmul.h.

    linear      y = x Wᵀ + b, with gradients: dx = dy W, dW = dyᵀ x, db = Σ dy over the rows
    product     y = x wᵀ + bias + addend of matrices

What bounds them: the multiply-adds, 2 M N K operations, and 4 M N K more with gradients, in float32 whatever the dtype.
Sums are float32, of 256 products at a time, and rounded once. A row of y has the same bits in any batch.

In 16 bits torch's products are quick where oneDNN has instructions for them (AVX-512 for bfloat16, AVX512-FP16 or
AMX-FP16 for float16). Elsewhere torch multiplies by loops of its own: on two threads of a Zen 3 it does x Wᵀ at 16 to
22 GFLOP/s and dy W, which every backward pass needs, at 0.5 to 0.9, where float32 has 106 to 118.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._autocast import SIXTEEN_BITS, autocast_dtype, lowered
from fused_transformer.kernels._checks import PLAIN_TYPES
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels.memory import empty_result

# FUSED_TRANSFORMER_MATMUL: "own" or "torch" whatever the processor.
SETTING = os.environ.get("FUSED_TRANSFORMER_MATMUL", "")


def _quicker(setting: str) -> frozenset[torch.dtype]:
    """The dtypes whose products by torch are the slower ones on this processor, or that the setting gives to ours."""
    if setting not in ("", "own", "torch"):
        raise ValueError(f"FUSED_TRANSFORMER_MATMUL must be own or torch, got {setting}")
    if not _native.available() or setting == "torch":
        return frozenset()
    if setting == "own":
        return frozenset(_native.DTYPES)
    found = {torch.float32} if _native.library().matmul_is_quicker() else set()
    if _native.library().isa() in ("avx2", "avx512"):
        found |= {dtype for dtype in SIXTEEN_BITS if not onednn_multiplies(dtype)}
    return frozenset(found)


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's products of this 16-bit type are oneDNN's on this processor."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return getattr(torch.ops.mkldnn, asked[dtype])()
    except (AttributeError, RuntimeError):  # a torch without oneDNN: what it does instead has not been timed
        return True


QUICKER = _quicker(SETTING)
# And whether those of few rows and many weights are in float32, where others are not: see csrc/linear/matmul.cpp.
QUICKER_FOR_FEW = SETTING == "" and _native.available() and _native.library().matmul_is_quicker_for_few_rows()
FEW_ROWS = range(4, 257)
MANY_WEIGHTS = 4_000_000
# Multiply-adds: fewer take less time than the calls around them.
LEAST = {torch.float32: 2**21, torch.float16: 2**16, torch.bfloat16: 2**16}
# Rows of x: the weights are put in order for the product, which fewer rows do not pay for.
LEAST_ROWS = {torch.float32: 16, torch.float16: 4, torch.bfloat16: 4}


def ever() -> bool:
    """Whether `takes` can be true here."""
    return len(QUICKER) > 0 or QUICKER_FOR_FEW


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` is the one to call, and not torch's: eager, on the CPU, and large enough."""
    if torch.compiler.is_compiling() or not ever():
        return False
    lower = autocast_dtype(x)
    dtype = lower or x.dtype
    if weight.dim() != 2 or not _is_worth_it(dtype, x, weight):
        return False
    dtypes = (dtype,) if lower is None else tuple(_native.DTYPES)
    return (
        _is_dense(weight, dtypes)
        and _is_dense(x, dtypes)
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (_is_dense(bias, dtypes) and bias.shape == weight.shape[:1]))
        and torch.autograd.forward_ad._current_level < 0
        and not routed(x)
    )


def _is_worth_it(dtype: torch.dtype, x: Tensor, weight: Tensor) -> bool:
    if dtype in QUICKER:
        return x.numel() * weight.shape[0] >= LEAST[dtype] and x.numel() >= LEAST_ROWS[dtype] * weight.shape[1]
    few = QUICKER_FOR_FEW and dtype == torch.float32 and weight.numel() >= MANY_WEIGHTS
    return few and x.numel() // weight.shape[1] in FEW_ROWS


def _is_dense(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    right = type(x) in PLAIN_TYPES and x.device.type == "cpu" and x.dtype in dtypes
    return right and x.layout == torch.strided and not x.is_nested


def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """x wᵀ + bias, of x (M, K), w (N, K) and bias (N,) of one dtype; into `out` (M, N; dense rows), or added to it.

    Without `out` the result has that dtype; `out` may be float32 whatever it is, and must be to be added to.
    """
    (M, K), N = x.shape, w.shape[0]
    y = empty_result(M, N, like=x) if out is None else out
    if x.dtype != w.dtype or (add and y.dtype != torch.float32):
        raise ValueError(f"x and w must be of one dtype, a sum float32; got {x.dtype}, {w.dtype}, {y.dtype}")
    if K == 0:
        x, w, K = x.new_zeros(M, 1), w.new_zeros(N, 1), 1
    bias = None if bias is None else bias.resolve_neg().float().contiguous()
    (x, left), (w, right), rows = _matrix(x), _matrix(w), (y.data_ptr(), y.stride(0))
    dtypes = _native.DTYPES
    added = rows if add else (0, 0)
    _native.library().matmul((M, N, K), dtypes[x.dtype], left, right, _native.ptr(bias), added, dtypes[y.dtype], rows)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear: x (..., K), weight (N, K), bias (N,), if `takes` says so."""
    x, weight = lowered(x, weight)
    bias = None if bias is None else lowered(bias)[0]
    rows = _rows(x)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = product(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """Of matrices: what a Function gives out as a view may not be written into, and y may."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        # For gradients of gradients and batches of gradients: by operations that have them.
        by_torch = torch.is_grad_enabled() or routed(dy) or not _has_memory(dy)
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if by_torch else product(dy, weight.t())
        if ctx.needs_input_grad[1]:
            # Few rows, the K of this product, are what makes the others quicker.
            by_torch |= dy.dtype not in QUICKER
            dweight = dy.t() @ x if by_torch else product(dy.t(), x.t())
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias


def _has_memory(x: Tensor) -> bool:
    try:
        x.data_ptr()
    except RuntimeError:  # the batches that torch.autograd.grad(..., is_grads_batched=True) makes
        return False
    return True


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _matrix(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x, or a copy of it, with contiguous rows or columns; and its address and strides."""
    x = x.resolve_neg()
    if x.stride(0) != 1 and x.stride(1) != 1 and min(x.shape) > 1:
        x = x.contiguous()
    row, column = x.stride()
    if x.shape[1] == 1:  # one column is contiguous rows, whatever its stride
        column = 1
    elif x.shape[0] == 1 and column != 1:
        row = 1
    return x, (x.data_ptr(), row, column)
