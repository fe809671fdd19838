"""A linear layer for inference, its weights packed once, with what follows it in the same pass."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.linear.checks import ACTIVATIONS, checked
from fused_transformer.kernels.linear.packed import WEIGHTS, PackedLinear

__all__ = ["ACTIVATIONS", "WEIGHTS", "PackedLinear", "linear", "op"]

op = Op(__name__, order=("cpu", "reference"))


def linear(x: Tensor, layer: PackedLinear, *, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    """A linear layer with packed weights. For inference alone: it has no gradient.

        y = activation(x Wᵀ + b) + residual

    Few rows are bound by reading the weights, (N · K) elements a call: packed, they lie in the order in which they are
    read, on large pages where the system gives them. Many rows are bound by the multiply-adds, 2 M N K operations.

    Args:
        x: (..., K) float32, any strides (a last axis that is not contiguous is copied).
        layer: W (N, K) and b (N,), packed by `PackedLinear`.
        activation: "none", "relu", "gelu" (x · Φ(x), the exact one) or "silu" (x · σ(x)).
        residual: (..., N) float32, added after the activation.

    Returns:
        y: (..., N) float32.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit, or a gradient is asked for.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: sums in float32; a row has the same bits in any batch. bfloat16 weights:
        x is rounded to bfloat16 too where the processor multiplies bfloat16. int8 weights: each row of x is rounded to
        255 levels of its largest magnitude, and sums are exact.
    """
    arguments = checked(x, layer, activation, residual)
    y = op.pick(*arguments).forward(*arguments)
    return y.view(*x.shape[:-1], layer.out_features)
