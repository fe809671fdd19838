"""A packed linear layer beside its weights in int8, which say what its results can be."""

from __future__ import annotations

from fused_transformer.kernels import _native
from fused_transformer.kernels.linear import PackedLinear


class ScreenedLinear:
    """What `linear_argmax` takes.

    Args:
        linear: with float32 weights, which must be finite, and a bias that is not NaN. It is kept, not copied.

    Attributes:
        linear: as given.
        rounded: the same layer with int8 weights; None without the compiled extension.
        nbytes: of what is held beside it: N · K bytes of int8 weights, and 8 N of bounds.
        most_rows: for so many `linear_argmax` is no slower than all results and a search through them; 0: for none.

    Raises:
        TypeError, ValueError: not a PackedLinear, or not one of that kind.
    """

    def __init__(self, linear: PackedLinear) -> None:
        if not isinstance(linear, PackedLinear):
            raise TypeError(f"linear must be a PackedLinear, got {type(linear).__name__}")
        if linear.weights != "float32":
            raise ValueError(f"only float32 weights are worth screening, got {linear.weights}")
        if linear.bias is not None and linear.bias.isnan().any():
            raise ValueError("a bias with NaN has no largest result")
        self.linear = linear
        self.native = None
        self.rounded: PackedLinear | None = None
        if linear.native is not None:
            self.rounded = PackedLinear(linear.matrix(), linear.bias, weights="int8")
            self.native = _native.library().Screen(linear.native, self.rounded.native, _native.ptr(linear.bias))

    @property
    def nbytes(self) -> int:
        return 0 if self.native is None else self.native.bytes

    @property
    def most_rows(self) -> int:
        return 0 if self.native is None else self.native.most_rows

    def __repr__(self) -> str:
        return f"ScreenedLinear({self.linear!r})"
