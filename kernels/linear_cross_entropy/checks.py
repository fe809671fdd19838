"""What the tensors of linear_cross_entropy must be, and in which dtype they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._autocast import autocast_dtype
from fused_transformer.kernels._checks import dense_last, require_float, require_same, require_shape


def lowered_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products in; None where it is off, or leaves hidden alone."""
    return None if hidden.dtype == torch.float64 else autocast_dtype(hidden)


def checked_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple:
    """What a backend takes first: tokens as rows, weight, bias, targets, the products' dtype."""
    require_float(hidden=hidden)
    return with_dtype(hidden, weight, bias, targets, lowered_dtype(hidden))


def with_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lowered) -> tuple:
    """`checked_tensors` where autocast's dtype is known. TypeError or ValueError unless the tensors go together."""
    require_float(hidden=hidden, weight=weight, bias=bias)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {str(targets.dtype).removeprefix('torch.')}")
    if hidden.dim() < 1 or hidden.shape[:-1] != targets.shape:
        shapes = f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"hidden must be (..., E) and targets (...), got shapes {shapes}")
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, {hidden.shape[-1]}) with V >= 1, got {tuple(weight.shape)}")
    require_shape("bias", bias, (weight.shape[0],))
    if lowered is None:
        require_same("dtype", hidden=hidden, weight=weight, bias=bias)
    require_same("device", hidden=hidden, weight=weight, bias=bias, targets=targets)
    rows = dense_last(hidden).reshape(-1, hidden.shape[-1])
    return rows, weight, bias, targets.reshape(-1), lowered or hidden.dtype
