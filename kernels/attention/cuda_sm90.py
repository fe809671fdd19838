"""Which forward kernel attention's CUDA backend takes: that of csrc/attention/forward_sm90.cu, which is Hopper's alone
(TMA and wgmma), or that of forward.cu, which every GPU since sm_80 runs.

Hopper's takes what csrc/attention/attention_sm90.h says on devices of compute capability 9.0, and forward.cu the rest:
on an H200 it needs 46 to 70 % of the other's time (heads of 64 and 128, 2,048 and 8,192 tokens, causal or not). The
results of both are held to the same bound, and differ in the last bits. FUSED_TRANSFORMER_SM90_ATTENTION=0 in the
environment, read when attention first runs on CUDA, turns it off, and `switched` does for a block. What a switch did
shows: `python -m fused_transformer info`, and `why_not_of_call` for a single call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_transformer.kernels import _cuda, _native
from fused_transformer.kernels.attention import native
from fused_transformer.kernels.attention.mask import Mask

SWITCH = "FUSED_TRANSFORMER_SM90_ATTENTION"
ON_BY_DEFAULT = True  # by bench_attention_on_hopper (bench/bench_attention.py)
ARCH = "sm_90a"

_C = _cuda.library()


def _read_switch() -> bool:
    text = os.environ.get(SWITCH, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1, got {text!r}")
    return text == "1" if text else ON_BY_DEFAULT


_on = _read_switch()
_native.library().attention_direct_hopper(_on)


def is_on() -> bool:
    """Whether Hopper's kernel may be taken."""
    return _on


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside the block the switch is on, or off, for all threads: for tests and benchmarks."""
    before = _on
    _set(on)
    try:
        yield
    finally:
        _set(before)


def _set(on: bool) -> None:
    global _on
    _on = on
    _native.library().attention_direct_hopper(on)  # a direct call chooses by itself


def why_not_here(device: torch.device) -> str | None:
    """None if Hopper's kernel may run on the device, else why it never does."""
    if not _on:
        return f"{SWITCH}=0 turned it off"
    if ARCH not in _C.cuda_archs.split(";"):
        return f"this build has no CUDA kernels for {ARCH}"
    major, minor = _cuda.capability(device)
    if not _cuda.runs_on(ARCH, major, minor):
        return f"{device} is of compute capability {major}.{minor}, and not 9.0"
    return None


def why_not(q: Tensor, problem: tuple) -> str | None:
    """None if Hopper's kernel takes this call (`problem` as native.py makes it), else why forward.cu does."""
    if not _on:  # ahead of all else: this is asked at every call
        return why_not_here(q.device)
    return why_not_here(q.device) or _C.attention_why_not_sm90_cuda(problem)


def why_not_of_call(q, k, v, mask: Mask, scale, dropout_p, seed) -> str | None:
    """`why_not` of what forward() is called with."""
    return why_not(q, native.problem(q, k, v, mask, scale, dropout_p, seed))
