"""What the arguments of linear must be."""

from __future__ import annotations

from fused_transformer.kernels._checks import rows_for_packed
from fused_transformer.kernels.linear.packed import PackedLinear

# The numbers of csrc/linear/linear.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}


def checked(x, layer, activation, residual) -> tuple:
    """What a backend takes: rows of x and of the residual, dense along their last axis."""
    if not isinstance(layer, PackedLinear):
        raise TypeError(f"layer must be a PackedLinear, got {type(layer).__name__}")
    rows = rows_for_packed("linear", "x", x, layer.in_features)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None:
        wanted = (*x.shape[:-1], layer.out_features)
        if residual.shape != wanted:
            raise ValueError(f"residual must have shape {wanted}, got {tuple(residual.shape)}")
        residual = rows_for_packed("linear", "residual", residual, layer.out_features)
    return rows, layer, activation, residual
