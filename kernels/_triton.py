"""What the Triton backends have in common: which tensors they take, their device, dropout bits and dot precision.

On a machine without a GPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first
import of triton, and only where `use_backend("triton")` asks for them: the interpreter is for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_transformer.kernels import _philox
from fused_transformer.kernels._dispatch import forced_backend

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALREADY = nullcontext()
OLDEST_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


def refuses_tensors(**tensors: Tensor | None) -> str | None:
    """Why the Triton kernels can't take these float tensors, or None."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device.type != "cuda" and not (x.device.type == "cpu" and INTERPRETED and forced_backend() == "triton"):
            return f"{name} must be on a CUDA device, got {x.device}"
        if x.dtype not in DTYPES:
            return f"{name} must be float32, float16 or bfloat16, got {str(x.dtype).removeprefix('torch.')}"
        if capability(x.device) < OLDEST_CAPABILITY:
            major, minor = capability(x.device)
            return f"{x.device} has compute capability {major}.{minor}, and these kernels need 8.0"
    return None


def current(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one: Triton launches on the current device's current stream, whatever x is on."""
    if not x.is_cuda or torch.cuda.current_device() == x.get_device():
        return _ALREADY
    return torch.cuda.device(x.device)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, which configurations are chosen by; the interpreter takes those of (8, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_CAPABILITY


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at least. The interpreter runs them one by one, so a few are enough there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision() -> str:
    """input_precision of tl.dot for float32 tensors: tf32 only where torch itself may use it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def dropout_numbers(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    """(threshold, keep_scale) as kernel arguments.

    The threshold is an unsigned 32-bit number passed as the int32 with the same bits: as a Python int of 2^31 or more
    it would become int64, and with it the kernel be compiled again.
    """
    if seed is None or dropout_p == 0.0:
        return 0, 1.0
    threshold = _philox.threshold(dropout_p)
    return threshold - 2**32 if threshold >= 2**31 else threshold, _philox.keep_scale(dropout_p)


@triton.jit
def kept(seed, threshold, outer, row, first_col, COLS: tl.constexpr):
    """(len(row), COLS) bool, False where dropout makes a zero: columns first_col ... first_col + COLS - 1 of each row.

    One Philox block of four words serves four columns, so first_col and COLS are multiples of 4. See _philox.py.
    seed: int64; threshold: as `dropout_numbers` gives it; outer: a scalar or as row; row: 1-D.
    """
    block = first_col // 4 + tl.arange(0, COLS // 4)
    c0 = (block[None, :] + 0 * row[:, None]).to(tl.uint32)  # [R, COLS / 4]
    c1 = (row[:, None] + 0 * block[None, :]).to(tl.uint32)
    c2 = c0 * 0 + tl.cast(outer, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c0 * 0)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [R, COLS], in the order of the columns
    return words >= tl.cast(threshold, tl.uint32, bitcast=True)
