"""The one door to the compiled extension `_C`: addresses, dtype codes, and why it is missing if it is."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # before _C, so that both share torch's OpenMP pool
from torch import Tensor

_C: ModuleType | None
try:
    from fused_transformer.kernels import _C  # type: ignore[attr-defined,no-redef]

    _missing = None
except ImportError:
    _C, _missing = None, "the compiled extension is missing"
    try:  # by its full name: the line above, amid the import of kernels itself, speaks of a circular one
        import_module("fused_transformer.kernels._C")
    except ImportError as error:
        _missing += f" ({error}); reinstall fused-transformer with a C++ compiler"

# The numbers of csrc/common/dtype.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def library() -> ModuleType:
    """The extension module; ImportError with the reason where it was not built."""
    if _C is None:
        raise ImportError(_missing)
    return _C


def available() -> bool:
    return _C is not None


def cuda_library() -> ModuleType:
    """The extension module, if it was compiled with CUDA; else ImportError with the reason."""
    if not library().cuda_archs:
        raise ImportError("this build has no CUDA: it was compiled without nvcc (FUSED_TRANSFORMER_CUDA=1 demands it)")
    return library()


def ptr(x: Tensor | None) -> int:
    """The address of the first element; 0 stands for None."""
    return 0 if x is None else x.data_ptr()


def refuses_tensors(device: str, **tensors: Tensor | None) -> str | None:
    """Why the native kernels for `device` can't take these float tensors, or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device.type != device:
            return f"{name} must be on a {device.upper()} device, got {x.device}"
        if x.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16, got {str(x.dtype).removeprefix('torch.')}"
    return None
