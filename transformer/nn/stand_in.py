"""torch.nn's classes and ours that stand in for them. A module turns from one into the other in place.

Ours are subclasses that add no parameter, buffer or submodule, so a change of `__class__` is all it takes: the object
stays the same one, and with it its parameters (an optimizer keeps them), its hooks, its name and whoever else holds it.
"""

from __future__ import annotations

from torch import nn

from fused_transformer.attention import MultiheadAttention, allow_bypass, forbid_bypass

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: MultiheadAttention}  # torch.nn's class: ours


def stands_in(ours: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: our class stands in for the torch.nn class that is its last base."""
    OURS[ours.__bases__[-1]] = ours
    return ours


def adopt(module: nn.Module) -> nn.Module:
    """Make `module`, whose class is one of torch.nn's in OURS, one of ours; in place."""
    module.__class__ = OURS[type(module)]
    if isinstance(module, MultiheadAttention):
        forbid_bypass(module)
    return module


def release(module: nn.Module) -> nn.Module:
    """Undo `adopt`."""
    module.__class__ = next(theirs for theirs, ours in OURS.items() if ours is type(module))
    if isinstance(module, nn.MultiheadAttention):
        allow_bypass(module)
    return module
