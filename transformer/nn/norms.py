"""nn.LayerNorm and nn.RMSNorm over the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_transformer.kernels import layer_norm, rms_norm
from fused_transformer.nn.stand_in import stands_in


class NormError(ValueError, RuntimeError):
    """The input does not end in normalized_shape. Callers of torch.nn expect a RuntimeError."""


@stands_in
class LayerNorm(nn.LayerNorm):
    """Drop-in for torch.nn.LayerNorm: constructor, parameters and state_dict are torch's.

        y = (x - mean(x)) / √(var(x) + eps) · weight + bias        over the axes of normalized_shape

    Nested tensors are left to torch's own kernel. Under autocast on a GPU the result is float32, as torch's. What
    differs: it can be differentiated once, so a gradient of a gradient is an error.

    Raises:
        NormError (a ValueError and a RuntimeError): the input's last axes are not normalized_shape.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested or 0 in self.normalized_shape:
            return super().forward(input)
        x = as_one_axis(input, self.normalized_shape)
        y = layer_norm(x, flat(self.weight), flat(self.bias), eps=self.eps)
        return y if y.shape == input.shape else y.view(input.shape)


@stands_in
class RMSNorm(nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm.

        y = x / √(mean(x²) + eps) · weight        over the axes of normalized_shape

    eps=None is the machine epsilon of the arithmetic: float64's for float64, else float32's. The rest as `LayerNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested or 0 in self.normalized_shape:
            return super().forward(x)
        rows = as_one_axis(x, self.normalized_shape)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if rows.dtype == torch.float64 else torch.float32).eps
        y = rms_norm(rows, flat(self.weight), eps=eps)
        return y if y.shape == x.shape else y.view(x.shape)


def as_one_axis(x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """x with the axes of normalized_shape, its last, as one."""
    axes = len(normalized_shape)
    if tuple(x.shape[x.dim() - axes :]) != tuple(normalized_shape):
        inner = ", ".join(map(str, normalized_shape))
        raise NormError(
            f"Given normalized_shape=[{inner}], expected input with shape [*, {inner}], but got input of size"
            f" {list(x.shape)}"
        )
    return x if axes == 1 else x.flatten(-axes)


def flat(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.dim() == 1 else parameter.flatten()
