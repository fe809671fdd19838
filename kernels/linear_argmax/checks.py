"""What the arguments of linear_argmax must be."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._checks import rows_for_packed
from fused_transformer.kernels.linear_argmax.screened import ScreenedLinear


def checked(x, layer) -> tuple[Tensor, ScreenedLinear]:
    """What a backend takes: rows of x, dense along their last axis."""
    if not isinstance(layer, ScreenedLinear):
        raise TypeError(f"layer must be a ScreenedLinear, got {type(layer).__name__}")
    return rows_for_packed("linear_argmax", "x", x, layer.linear.in_features), layer
