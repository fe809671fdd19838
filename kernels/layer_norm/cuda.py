"""Layer norm in CUDA C++, for tensors on a GPU; see csrc/layer_norm."""

from __future__ import annotations

from functools import cache

import torch

from fused_transformer.kernels._native import cuda_library, refuses_tensors, stream
from fused_transformer.kernels.layer_norm import native

_C = cuda_library()

# The sums over rows are taken by at most this many blocks a multiprocessor: as many as run at once. Each costs N
# floats of traffic a sum, written and read again.
BLOCKS_PER_MULTIPROCESSOR = 2
# Up to this many columns a block takes eight rows at a time, one a warp (csrc/layer_norm/backward.cu).
WARP_COLUMNS, WARP_ROWS = 1024, 8


def refuses(x, *_args) -> str | None:
    return refuses_tensors("cuda", x=x) or _refuses_device(x.device)


def forward(x, *args):
    with torch.cuda.device(x.device):
        current = stream(x)
        return native.forward(lambda *a: _C.layer_norm_forward_cuda(*a, current), x, *args)


def backward(dy, dtotal, total, *args):
    cols = total.shape[-1]
    rows_at_once = WARP_ROWS if cols <= WARP_COLUMNS else 1
    enough = -(-(total.numel() // cols) // rows_at_once)
    parts = max(1, min(enough, BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(total.device)))
    with torch.cuda.device(total.device):
        current = stream(total)
        return native.backward(lambda *a: _C.layer_norm_backward_cuda(*a, current), parts, dy, dtotal, total, *args)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _refuses_device(device: torch.device) -> str | None:
    """Why this build's machine code and PTX do not run on the device, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if any(runs_on(arch, major, minor) for arch in _C.cuda_archs.split(";")):
        return None
    return f"this build has CUDA kernels for {_C.cuda_archs}, and {device} is sm_{major}{minor}"


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
