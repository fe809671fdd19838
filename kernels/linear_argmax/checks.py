"""What the arguments of linear_argmax must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import dense_last, require
from fused_transformer.kernels.linear_argmax.screened import ScreenedLinear


def checked(x, layer) -> tuple[Tensor, ScreenedLinear]:
    """What a backend takes: rows of x, dense along their last axis."""
    if not isinstance(layer, ScreenedLinear):
        raise TypeError(f"layer must be a ScreenedLinear, got {type(layer).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    inputs = layer.linear.in_features
    require(x.dim() >= 1 and x.shape[-1] == inputs, f"x must have shape (..., {inputs}), got {tuple(x.shape)}")
    require(x.dtype == torch.float32, f"x must be float32, got {x.dtype}")
    require(x.device.type == "cpu", f"x must be on the CPU, where the packed weights are, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("linear_argmax has no gradient, and x requires one: use torch.no_grad()")
    return dense_last(x.reshape(-1, inputs)), layer
