"""linear in C++ for the CPU; see csrc/linear."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels.linear.checks import ACTIVATIONS
from fused_transformer.kernels.memory import empty_pages

_C = _native.library()

# How products are computed, of csrc/linear/linear.h; "best" is the fastest that the processor has.
MULTIPLIERS = {"best": 0, "vectors": 1, "dots": 2, "tiles": 3}


def refuses(_x, layer, _activation, _residual) -> str | None:
    return "the weights were packed without the compiled extension" if layer.native is None else None


def forward(x: Tensor, layer, activation: str, residual: Tensor | None, multiplier: str = "best") -> Tensor:
    rows = x.shape[0]
    y = empty_pages(rows, layer.out_features, like=x)
    scratch = x.new_empty(_C.linear_scratch(layer.native, rows) + 63, dtype=torch.uint8)
    _C.linear(
        layer.native,
        rows,
        (x.data_ptr(), x.stride(0)),
        _native.ptr(layer.bias),
        (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0)),
        (y.data_ptr(), y.stride(0)),
        ACTIVATIONS[activation],
        MULTIPLIERS[multiplier],
        (scratch.data_ptr() + 63) // 64 * 64,
    )
    return y
