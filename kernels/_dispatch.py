"""Chooses the backend of an op, and says why the others were not chosen.

A backend of an op is a module beside the op with three names:

    forward(*args)    allocates, launches, returns the outputs and the saved statistics
    backward(*args)   returns the gradients; absent if the backend is for inference only
    refuses(*args)    None if it takes the arguments of `forward`, else the reason as one sentence
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")
ON_CPU = ("cpu", "reference")  # these take CPU tensors; Triton's interpreter does too, where it is forced

_forced: ContextVar[str | None] = ContextVar("forced_backend", default=None)

OPS: dict[str, Op] = {}  # filled as ops are imported; `python -m fused_transformer info` reads it


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on backend `name`; None gives the choice back to the ops.

    Around a function made by torch.compile, or an exported program, it acts when they run: the choice is no part of the
    graph. Such a graph's backward pass chooses anew, so it wants the block as well; and on a GPU autograd runs that on
    a thread of its own, which the block does not reach: there the ops choose. (Eager ops go back on the backend they
    came by.) Inside a compiled function the block is a graph break.

    Args:
        name: "cuda", "triton", "cpu", "reference" or None.

    Raises:
        ValueError: at once, if there is no backend of that name.
        NotImplementedError: by an op inside the block, with the reason, where the backend refuses its
            arguments. Nothing ever falls back to another backend in silence.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("use_backend acts when ops run, not when they are traced: put it around the compiled call")
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that `use_backend` forces here, or None."""
    return _forced.get()


_observer: Callable[[Op, str, tuple], None] | None = None


@contextmanager
def observe(observer: Callable[[Op, str, tuple], None]) -> Iterator[None]:
    """Inside the block, tell observer(op, backend, arguments) of every call of an op, once its backend is chosen.

    One observer at a time, for all threads. Without one a call pays for a test.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def undisturbed() -> bool:
    """Whether nobody forces a backend or looks on: then an op may take a way round its backends' three functions."""
    return _observer is None and _forced.get() is None


class Op:
    """The backends of one op in order of preference; the last, "reference", refuses nothing.

    first: of the arguments of `forward`, the backend to ask ahead of that order, or None. It may look at dtypes, widths
        and devices, and at nothing that other sequences of a batch decide.
    """

    def __init__(self, package: str, order: tuple[str, ...], first: Callable[..., str | None] | None = None):
        self.name = package.rpartition(".")[2]
        self.package = package
        self.order = order
        self.first = first
        self._on_cpu = tuple(backend for backend in order if backend in ON_CPU)
        # The module, or why it did not import: remembered, because trying again costs 400 µs a call.
        self._modules: dict[str, ModuleType | str] = {}
        OPS[self.name] = self

    def module(self, backend: str) -> ModuleType | str:
        """The backend's module, or the sentence that says why there is none."""
        found = self._modules.get(backend)
        if found is None:
            try:
                found = importlib.import_module(f".{backend}", self.package)
            except ImportError as error:
                missing = f"{self.package}.{backend}"
                absent = isinstance(error, ModuleNotFoundError) and error.name == missing
                found = "not written yet" if absent else f"not importable here: {error}"
            self._modules[backend] = found
        return found

    def on(self, x: Tensor) -> ModuleType:
        """The backend whose kernel a direct call on x runs."""
        module = self.module("cpu" if x.is_cpu else "cuda")
        assert isinstance(module, ModuleType), module
        return module

    def why_not(self, backend: str, *args) -> str | None:
        """None if `backend` takes these arguments, else why it does not."""
        if backend not in self.order:
            return f"{self.name} has no backend of that name"
        module = self.module(backend)
        return module if isinstance(module, str) else module.refuses(*args)

    def serves(self, *args) -> bool:
        """Whether a backend ahead of the reference takes these arguments here; if one is forced, whether that one does.

        Where none does, a module that has torch's own functions for the same work may call those.
        """
        forced = forced_backend()
        return any(
            self.why_not(backend, *args) is None
            for backend in ((forced,) if forced else self.order)
            if forced or backend != "reference"
        )

    def order_for(self, *args) -> tuple[str, ...]:
        """`preference` without the backends that would refuse the first argument because of its device."""
        on_cpu = self._on_cpu and args and isinstance(args[0], Tensor) and args[0].is_cpu
        return self._on_cpu if on_cpu and self._on_cpu[-1] == "reference" else self.preference(*args)

    def preference(self, *args) -> tuple[str, ...]:
        """`first`, if there is one for these arguments, then the others of `order`."""
        first = None if self.first is None else self.first(*args)
        return self.order if first is None else (first, *(backend for backend in self.order if backend != first))

    def pick(self, *args) -> ModuleType:
        """The first backend that takes `args`; the forced one, if there is one, or an error."""
        forced = _forced.get()
        reasons = {}
        for backend in (forced,) if forced else self.order_for(*args):
            module = self._modules.get(backend)  # in most calls it has been imported
            why = module.refuses(*args) if type(module) is ModuleType else self.why_not(backend, *args)
            if why is None:
                if _observer is not None:
                    _observer(self, backend, args)
                return self._modules[backend]  # type: ignore[return-value]
            reasons[backend] = why
        lines = "\n".join(f"  {backend}: {why}" for backend, why in reasons.items())
        raise NotImplementedError(f"{self.name}: no backend takes these arguments\n{lines}")
