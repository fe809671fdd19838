"""What the layers fuse, and when: two modules become one op where calling them would do nothing more.

A hook on a norm, a dropout that somebody replaced, LoRA around linear1: such modules are called as what they are, one
by one, and see the tensors that torch.nn's layer would show them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.attention import MultiheadAttention
from fused_transformer.kernels import add_layer_norm, add_layer_norm_with_total
from fused_transformer.kernels.bias_act import bias_act, has_kernel
from fused_transformer.nn.norms import LayerNorm
from fused_transformer.plain import LINEARS, plain


def is_layer_norm(module: nn.Module) -> bool:
    """Whether `module` is a LayerNorm of the last axis that can be computed together with the sum before it."""
    return plain(module, LayerNorm, nn.LayerNorm) and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def add_norm(x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module) -> Tensor:
    """norm(residual + dropout(x)), in one pass where `plain`."""
    if not (plain(dropout, nn.Dropout) and is_layer_norm(norm)):
        return norm(residual + dropout(x))
    return add_layer_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=rate(dropout))  # type: ignore[arg-type]


class Stream(NamedTuple):
    """What flows through a stack: x, or in pre-norm residual + dropout(x), not added yet: the next norm will do it."""

    x: Tensor
    residual: Tensor | None = None
    dropout: nn.Module | None = None

    def total(self) -> Tensor:
        return self.x if self.residual is None else self.residual + self.dropout(self.x)  # type: ignore[misc]

    def normalised(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """norm(total) and total."""
        if self.residual is None or not (plain(self.dropout, nn.Dropout) and is_layer_norm(norm)):  # type: ignore[arg-type]
            total = self.total()
            return norm(total), total
        p = rate(self.dropout)  # type: ignore[arg-type]
        return add_layer_norm_with_total(self.x, self.residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=p)  # type: ignore[arg-type]


def rate(dropout: nn.Module) -> float:
    """The probability with which nn.Dropout drops now."""
    return float(dropout.p) if dropout.training else 0.0  # type: ignore[arg-type]


def known_activation(activation) -> str | None:
    """The name under which the bias_act op knows an activation (a function or a module), or None."""
    if activation is F.relu or (isinstance(activation, nn.Module) and plain(activation, nn.ReLU)):
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, nn.Module) and plain(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return None


def activated(hidden: Tensor, activation, dropout: nn.Module) -> Tensor:
    """dropout(activation(hidden)), in one pass where both are known and `plain` and a kernel is there for it."""
    name = known_activation(activation)
    if name is None or not plain(dropout, nn.Dropout) or not has_kernel(hidden, name, rate(dropout)):
        return dropout(activation(hidden))
    return bias_act(hidden, activation=name, dropout_p=rate(dropout))


def position_wise(*modules: nn.Module | None) -> bool:
    """Whether the modules are `plain` and treat each position alone (attention: each packed sequence)."""
    for module in modules:
        if module is None or plain(module, *LINEARS, nn.Dropout) or is_layer_norm(module):
            continue
        if not (plain(module, MultiheadAttention) and module.bias_k is None and not module.add_zero_attn):
            return False
    return True
