"""The weights of a linear layer, packed once for many calls."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from fused_transformer.kernels import _native

# The forms of csrc/linear/linear.h.
WEIGHTS = {"float32": 0, "bfloat16": 1, "int8": 2}
LEVELS = 127  # of int8, on either side of 0


class PackedLinear:
    """W (N, K) and b (N,) of y = x Wᵀ + b in the order in which the kernels read them; a copy, read-only.

    Args:
        weight: (N, K) of any float dtype, on the CPU.
        bias: (N,) or None.
        weights: the form the weights are kept in:
            "float32"
            "bfloat16": rounded to nearest; half the memory to read.
            "int8": W[n, k] = scale[n] · q[n, k] with q in -127 ... 127 and scale[n] = max |W[n]| / 127; a quarter.

    Attributes:
        out_features, in_features: N and K.
        bias: (N,) float32 or None.
        nbytes: of the packed weights.

    Raises:
        TypeError, ValueError: the weight is no float matrix on the CPU, holds NaN or infinity ("int8"), or `weights` is
            none of the three.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, weights: str = "float32") -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x is not None and (x.device.type != "cpu" or not x.is_floating_point()):
                raise ValueError(f"{name} must be a float tensor on the CPU, got {x.dtype} on {x.device}")
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight must be (N, K) with N, K >= 1, got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
        self.weights = weights
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        matrix = weight.detach().to(torch.float32).contiguous()
        self.native = None
        self._matrix = torch.empty(0, device="cpu")  # without the extension, all there is
        try:
            pack = _native.library().pack_weight
        except ImportError:
            finite = bool(matrix.isfinite().all())
            self._matrix = as_rounded(matrix, weights)  # the reference works without the extension
        else:
            self.native = pack(matrix.data_ptr(), matrix.stride(0), *matrix.shape, WEIGHTS[weights])
            finite = self.native.finite
        if weights == "int8" and not finite:
            raise ValueError("weights that are not finite cannot be rounded to int8")

    @property
    def nbytes(self) -> int:
        if self.native is not None:
            return self.native.bytes
        return self.out_features * self.in_features * {"float32": 4, "bfloat16": 2, "int8": 1}[self.weights]

    def with_bias(self, bias: Tensor | None) -> PackedLinear:
        """The same packed weights, which are not copied, beside another bias (N,) float32."""
        if bias is not None and (bias.shape != (self.out_features,) or bias.dtype != torch.float32):
            raise ValueError(f"bias must be ({self.out_features},) float32, got {tuple(bias.shape)} {bias.dtype}")
        other = copy(self)
        other.bias = None if bias is None else bias.detach().contiguous()
        return other

    def matrix(self) -> Tensor:
        """(N, K) float32: what the packed weights stand for."""
        if self.native is None:
            return self._matrix
        out = torch.empty(self.out_features, self.in_features, device="cpu")
        _native.library().unpack_weight(self.native, out.data_ptr())
        return out

    def __repr__(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"PackedLinear({shape}, bias={self.bias is not None}, weights={self.weights!r})"


def as_rounded(matrix: Tensor, weights: str) -> Tensor:
    """(N, K) float32 as the form `weights` keeps it."""
    if weights == "bfloat16":
        return matrix.to(torch.bfloat16).float()
    if weights == "int8":
        levels, scales = to_levels(matrix)
        return levels * scales
    return matrix.clone()


def to_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (M, K) as whole numbers -127 ... 127, and (M, 1) what they are multiplied by."""
    largest = x.abs().amax(-1, keepdim=True)
    inverse = LEVELS / largest
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)  # of 0, and what is next to it
    return (x * inverse).round(), largest / LEVELS
