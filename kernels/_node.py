"""What was compiled with torch's headers (csrc/with_torch): autograd's nodes in C++ for direct calls, and torch's
allocation without Python between. Without it, or with another release of torch than it was compiled for, all that it
does is done by way of Python: the same numbers, and a small call takes longer.

An op passes KEEP to its direct call. Where that is None and a gradient is wanted the call returns a list of what it
kept, and `Plan.attach` hangs a node on the results. Otherwise the call returns True, and goes through the op's
autograd.Function.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fused_transformer.kernels import _direct, _native


def _found() -> tuple[ModuleType | None, str | None]:
    """The module, or why it is not used."""
    if os.environ.get("FUSED_TRANSFORMER_NODES") == "0":
        return None, "FUSED_TRANSFORMER_NODES=0 turned them off"
    if _direct.WHY_NONE is not None:
        return None, "there are no direct calls"
    try:
        module = import_module("fused_transformer.kernels._torch")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        return None, "the install compiled none, and said why" if absent else f"not for this torch: reinstall ({error})"
    if module.torch_version != torch.__version__:
        return None, f"compiled for torch {module.torch_version}: reinstall fused-transformer for {torch.__version__}"
    _native.library().direct_use_functions(module.functions)
    return module, None


_library, WHY_NONE = _found()

# What a direct call is to keep: with nodes what a gradient asks for, if one is wanted; else nothing.
KEEP: bool | None = False if _library is None else None


class Plan:
    """How an op's node computes gradients: by its backward direct call, or where that is not for it by Python.

    Args:
        name: the node's, as grad_fn.name() has it.
        function: the op's autograd.Function, whose backward method is Python's way. It finds in its context
            `saved_tensors` and `needs_input_grad`, as from autograd, and what `context` makes of the constants.
        context: (saved, constants) -> the context's other attributes.
        backward: name of the direct call; None: there is none.
        sources: its arguments, as "g0 s0 s1 c0 n": a gradient of an output, a saved tensor or a constant, by their
            numbers, and the tuple that says of each input whether its gradient is needed.
        inputs: which of the Function's inputs those of the node are.
    """

    def __init__(
        self,
        name: str,
        function: type[torch.autograd.Function],
        context: Callable[[tuple, tuple], dict[str, Any]],
        *,
        backward: str | None,
        sources: str = "",
        inputs: tuple[int, ...],
    ):
        def otherwise(saved, needed, constants, *gradients):
            asked = [False] * (max(inputs) + 1)
            for number, wanted in zip(inputs, needed, strict=True):
                asked[number] = wanted
            attributes = context(saved, constants)
            ctx = SimpleNamespace(saved_tensors=saved, needs_input_grad=tuple(asked), **attributes)
            found = function.backward(ctx, *gradients)
            return tuple(found[number] for number in inputs)

        if _library is not None:
            direct = None if backward is None else getattr(_native.library(), backward)
            # (outputs, inputs, saved, constants), tuples all: from now on a gradient of the outputs goes to the inputs;
            # an output may be among what is saved
            self.attach = partial(_library.attach, _library.make_plan(name, direct, otherwise, sources))
