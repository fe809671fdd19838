"""What the tensors of a layer norm must be, and which gradients its backends are asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.kernels._checks import require_float, require_same


class Wanted(NamedTuple):
    """Which gradients `backward` is asked for."""

    dx: bool
    dresidual: bool
    dx_bias: bool
    dweight: bool
    dbias: bool


def check_tensors(x, residual, x_bias, weight, bias) -> tuple[Tensor, Tensor | None]:
    """x and residual in one dtype, if all five go together. Messages are made only where they are raised."""
    require_float(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    shape, device = x.shape, x.device
    if not shape or shape[-1] < 1:
        raise ValueError(f"x must have shape (..., N) with N >= 1, got {tuple(shape)}")
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual must have x's shape {tuple(shape)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            wider = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(wider), residual.to(wider)
    for name, p in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if p is None:
            continue
        if p.shape != shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(shape[-1:])}, got {tuple(p.shape)}")
        if p.dtype not in (x.dtype, torch.float32):
            have, want = (str(t.dtype).removeprefix("torch.") for t in (p, x))
            raise ValueError(f"{name} must be float32 or, as x is, {want}; got {have}")
    if any(t is not None and t.device != device for t in (residual, weight, bias, x_bias)):
        require_same("device", x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    return x, residual


def check_eps(eps: float) -> None:
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
