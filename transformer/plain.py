"""Whether a module is what its class says, so that what it computes can be computed in another way."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)


def no_op(module: nn.Module, args: tuple) -> None:
    """The hook of `attention.forbid_bypass`."""


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether `module` has forward pre-hooks other than `no_op`."""
    hooks = module._forward_pre_hooks
    return bool(hooks) and [*hooks.values()] != [no_op]


def plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` is exactly what its class, one of `kinds`, says: nothing hooked, replaced or compiled.

    (Subclasses don't count, and so neither do parametrized modules, whose class is made for them.)
    """
    return (
        type(module) in kinds
        and not (module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not has_pre_hooks(module)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )
