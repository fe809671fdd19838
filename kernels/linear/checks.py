"""What the arguments of linear must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import dense_last, require
from fused_transformer.kernels.linear.packed import PackedLinear

# The numbers of csrc/linear/linear.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}


def checked(x, layer, activation, residual) -> tuple:
    """What a backend takes: rows of x and of the residual, dense along their last axis."""
    if not isinstance(layer, PackedLinear):
        raise TypeError(f"layer must be a PackedLinear, got {type(layer).__name__}")
    rows = _rows("x", x, layer.in_features)
    require(activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        wanted = (*x.shape[:-1], layer.out_features)
        require(residual.shape == wanted, f"residual must have shape {tuple(wanted)}, got {tuple(residual.shape)}")
        residual = _rows("residual", residual, layer.out_features)
    return rows, layer, activation, residual


def _rows(name: str, x: Tensor, columns: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    require(x.dim() >= 1 and x.shape[-1] == columns, f"{name} must have shape (..., {columns}), got {tuple(x.shape)}")
    require(x.dtype == torch.float32, f"{name} must be float32, got {x.dtype}")
    require(x.device.type == "cpu", f"{name} must be on the CPU, where the packed weights are, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"linear has no gradient, and {name} requires one: use torch.no_grad()")
    return dense_last(x.reshape(-1, columns))
