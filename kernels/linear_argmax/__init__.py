"""The largest result of a linear layer and whose it is, by reading a quarter of the weights. For inference alone."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.linear_argmax.checks import checked
from fused_transformer.kernels.linear_argmax.screened import ScreenedLinear

__all__ = ["ScreenedLinear", "linear_argmax", "op"]

op = Op(__name__, order=("cpu", "reference"))


def linear_argmax(x: Tensor, layer: ScreenedLinear) -> tuple[Tensor, Tensor]:
    """The largest of each row's results, and the first column where it is.

        y = x Wᵀ + b        values[m] = maxₙ y[m, n]        places[m] = the least n with y[m, n] = values[m]

    What `linear(x, layer.linear).max(-1)` gives, to the bit, of which a step of greedy decoding needs no more. Few rows
    are bound by reading W, 4 N K bytes. Here N K are read, W rounded to int8 (Q), which tell within what bounds each
    result lies (x' is x to 8 bits, with AVX2 to 7, with AVX-512 to 16):

        |yₙ - x' Qₙᵀ - bₙ| <= |x| |Wₙ - Qₙ| + |x - x'| |Qₙ| + rounding              (Cauchy and Schwarz)

    Only columns that can be the largest by these bounds are computed from W, with the 16 or 64 that are packed together
    with each of them: with random numbers about 8 such blocks of 32,000 columns (2 with 16 bits), fewer with a trained
    model's. Where the bounds leave many, all results are computed, some columns at a time, so that none is written to
    memory: the result is the same. So are those of more than 32 rows where bytes are multiplied no sooner than float32
    (without AVX2 and AVX-512).

    Args:
        x: (..., K) float32, any strides (a last axis that is not contiguous is copied).
        layer: W (N, K) and b (N,), a `ScreenedLinear`.

    Returns:
        values: (...) float32; NaN where a result of the row is NaN.
        places: (...) int64.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices do not fit, or a gradient is asked for.
        NotImplementedError: a backend was forced that refuses these arguments.
    """
    rows, layer = checked(x, layer)
    values, places = op.pick(rows, layer).forward(rows, layer)
    return values.view(x.shape[:-1]), places.view(x.shape[:-1])
