"""What the CUDA backends have in common: the compiled functions, which tensors they take, the device and its stream.

Call these as attributes of the module (`_cuda.current(x)`): on a machine without a GPU the tests replace them, and run
the same kernels on the CPU (tests/emulated.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_transformer.kernels import _native

_ALREADY = nullcontext()


def library() -> ModuleType:
    """The extension module, whose functions `<op>_..._cuda` these are; ImportError where it was built without CUDA."""
    return _native.cuda_library()


def refuses_tensors(**tensors: Tensor | None) -> str | None:
    """Why the CUDA kernels of this build can't take these float tensors, or None."""
    why = _native.refuses_tensors("cuda", **tensors)
    given = next((x for x in tensors.values() if x is not None), None)
    return why if why is not None or given is None else _refuses_device(given.device)


def current(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one, which is where a kernel is launched, whatever its pointers point to."""
    return _ALREADY if torch.cuda.current_device() == x.get_device() else torch.cuda.device(x.device)


def on_current_stream(function: Callable[..., None], x: Tensor) -> Callable[..., None]:
    """`function` with its last argument, the stream, filled in: the current one of x's device."""
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())  # what Inductor's code calls: no Stream object is made

    def launch(*args: Any) -> None:
        function(*args, stream)

    return launch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, as (9, 0)."""
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _refuses_device(device: torch.device) -> str | None:
    """Why this build's machine code and PTX do not run on the device, or None."""
    archs = _native.cuda_library().cuda_archs
    major, minor = capability(device)
    if any(runs_on(arch, major, minor) for arch in archs.split(";")):
        # once for each device, when the first call has found it fit: later ones may be direct
        _native.library().direct_device(device.index, device, multiprocessors(device), major, minor)
        return None
    return f"this build has CUDA kernels for {archs}, and {device} is sm_{major}{minor}"


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch` (sm_80, sm_90a, compute_80: PTX) runs on a device of compute capability major.minor."""
    kind, _, number = arch.partition("_")
    exact = number[-1] in "af"  # code with an architecture's own features runs on that one alone
    number = number.rstrip("af")
    have = (int(number[:-1]), int(number[-1]))
    if exact:
        return have == (major, minor)
    if kind == "compute":
        return have <= (major, minor)
    return have[0] == major and have[1] <= minor
