"""What the tensors of bias_act must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import require_float, require_same

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")


def check(x: Tensor, bias: Tensor | None, activation: str) -> None:
    """TypeError or ValueError, in the caller's words, unless they go together."""
    require_float(x=x, bias=bias)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape (..., F) with F >= 1, got {tuple(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape {tuple(x.shape[-1:])}, got {tuple(bias.shape)}")
    if bias.dtype not in (x.dtype, torch.float32):
        have, want = (str(t.dtype).removeprefix("torch.") for t in (bias, x))
        raise ValueError(f"bias must be float32 or, as x is, {want}; got {have}")
    require_same("device", x=x, bias=bias)
