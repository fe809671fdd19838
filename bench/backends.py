"""Ours on each of its compiled backends that a device has: a column for every one that a row did not choose itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bench.timing import Within, context_of
from fused_transformer.kernels import use_backend

# The reference is no competitor: it is the naive code, and every row has that already.
COMPILED = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def others(own: Callable, seen: set[str], ours: str, device: str) -> dict[str, Callable]:
    """Ours forced on each backend that is not among those it ran on, by label. Any of them may refuse the row."""
    if len(COMPILED[device]) < 2:
        return {}
    function = own.function if isinstance(own, Within) else own
    rest = [backend for backend in COMPILED[device] if backend not in seen]
    return {f"{ours} {backend}": Within(partial(both, own, backend), function) for backend in rest}


@contextmanager
def both(own: Callable, backend: str) -> Iterator[None]:
    """The context that `own` needs itself, and the backend forced in it."""
    with context_of(own), use_backend(backend):
        yield
