"""linear in plain torch: the meaning every other backend is tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fused_transformer.kernels.linear.packed import to_levels

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def refuses(*_args) -> None:
    return None


def forward(x: Tensor, layer, activation: str, residual: Tensor | None) -> Tensor:
    if layer.weights == "int8":
        levels, scales = to_levels(x)
        x = levels * scales
    y = ACTIVATIONS[activation](F.linear(x, layer.matrix(), layer.bias))
    return y if residual is None else y + residual
