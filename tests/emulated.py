"""The CUDA backends on a machine without a GPU: every .cu of csrc/ compiled by g++ and run on the CPU.

tests/csrc/emulator takes the place of the GPU. Each op becomes an extension module of its own (tests/csrc/building.py),
whose `..._cuda` functions take addresses of CPU tensors; it is built when a test first needs it.

`install()`, which conftest.py calls, puts the emulator in the place of a device: from then on `running_on("cuda")` of
tests/inputs.py runs kernels/<op>/cuda.py on CPU tensors, and the op tests' backend "cuda" is named cuda-emulated.
Outside of running_on the backend refuses CPU tensors as it always does.

The environment says how: FUSED_TRANSFORMER_EMULATED=plain|asan|tsan (the last two need the sanitizer's library in
LD_PRELOAD: see tests/csrc/sanitized.py), EMU_ORDER and EMU_ASYNC as tests/csrc/emulator/block.h has them, and
FUSED_TRANSFORMER_EMULATED_CSRC=FOLDER, where the .cu files are taken from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.csrc import building

# A test with more elements than this in one tensor is skipped: the emulator takes about a microsecond for each.
MOST_ELEMENTS = 1 << 17


def mode() -> str:
    """What FUSED_TRANSFORMER_EMULATED says: plain, asan or tsan."""
    return os.environ.get("FUSED_TRANSFORMER_EMULATED", "") or "plain"


@cache
def load(op: str) -> ModuleType:
    """The emulated module of `op`, built if need be."""
    csrc = Path(os.environ.get("FUSED_TRANSFORMER_EMULATED_CSRC", "") or building.CSRC)
    name = f"{op}._emulated"  # pybind11 gives out one module for each name, and the last word is the init function's
    loader = ExtensionFileLoader(name, str(building.build_op(op, mode(), csrc)))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class Library:
    """What stands for `_C`: each function `<op>_...` is that of the op's emulated module."""

    cuda_archs = "sm_80;sm_90a"  # what the emulator knows

    def __getattr__(self, name: str) -> Any:
        ops = [path.parent.name for path in building.CSRC.glob("*/bind.cpp") if name.startswith(f"{path.parent.name}_")]
        if not ops:
            raise AttributeError(f"no op of csrc/ has a function {name}")
        function = getattr(load(max(ops, key=len)), name)
        setattr(self, name, function)  # found at once from now on
        return function


_wanted: ContextVar[bool] = ContextVar("emulator_wanted", default=False)
_capability: ContextVar[tuple[int, int]] = ContextVar("emulated_capability", default=(8, 0))
_installed = False


def installed() -> bool:
    """Whether the backend "cuda" is the emulator in this process."""
    return _installed


@contextmanager
def wanted() -> Iterator[None]:
    """Inside, the CUDA backends take CPU tensors."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def capability(major: int, minor: int) -> Iterator[None]:
    """Inside, the emulated device is of this compute capability; 8.0 otherwise."""
    token = _capability.set((major, minor))
    try:
        yield
    finally:
        _capability.reset(token)


def install() -> None:
    """Puts the emulator in the place of a CUDA device, where there is none and a compiler is."""
    global _installed
    if _installed or torch.cuda.is_available() or shutil.which(building.compiler()[0]) is None:
        return
    from fused_transformer.kernels import _cuda, _native

    refuses_on_a_device = _cuda.refuses_tensors

    def refuses_tensors(**tensors):
        if not _wanted.get():
            return refuses_on_a_device(**tensors)
        most = max((x.numel() for x in tensors.values() if x is not None), default=0)
        too_many = f"{most} elements take the emulator too long" if most > MOST_ELEMENTS else None
        return _native.refuses_tensors("cpu", **tensors) or too_many

    def on_current_stream(function, x):
        return lambda *args: function(*args, 0)

    _cuda.library = Library
    _cuda.refuses_tensors = refuses_tensors
    _cuda.current = lambda x: nullcontext()
    _cuda.on_current_stream = on_current_stream
    _cuda.capability = lambda device: _capability.get()
    _cuda.multiprocessors = lambda device: 2
    _installed = True
