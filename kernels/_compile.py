"""What the ops do under torch.compile: today a graph break around each op, so that compiled equals eager.

This is the place for the ops' torch.library registration (define, impl, register_fake, autograd): then a
compiled model will hold the ops as nodes of its graph. Eager calls pay one flag test and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


_disabled: dict[Callable, Callable] = {}  # not functools.cache, which torch.compile warns about


def _outside_the_graph(function: Callable[P, R]) -> Callable[P, R]:
    # Made on first use: torch.compiler.disable imports all of torch._dynamo, which takes seconds.
    disabled = _disabled.get(function)
    if disabled is None:
        disabled = _disabled[function] = torch.compiler.disable(function)
    return disabled


def graph_break(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public op: inside torch.compile it runs eagerly between two graphs."""

    @wraps(function)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return _outside_the_graph(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return op
