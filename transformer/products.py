"""The linear layers of a model, by torch or by this package's own product, whichever is the quicker here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_transformer.kernels import matmul
from fused_transformer.plain import LINEARS, plain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: torch.nn.functional.linear's arguments and result."""
    return matmul.linear(x, weight, bias) if matmul.takes(x, weight, bias) else F.linear(x, weight, bias)


def applied(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); by `linear` if it is a linear layer that nobody hooked, parametrized or replaced."""
    if torch.compiler.is_compiling() or not matmul.ever() or not plain(module, *LINEARS) or _has_any_global_hook():
        return module(x)
    return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
