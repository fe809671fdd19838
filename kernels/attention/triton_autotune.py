"""The fastest of several tiles, by timing them on the GPU: only where FUSED_TRANSFORMER_AUTOTUNE=1 asks for it.

The first call of a kind launches each candidate a few times and keeps the fastest for later calls; without it the table
of triton_config.py decides. A kind is the kernel, its dtype, head width and GPU, and which masks there are: neither
batch nor length, which would make it time again and again, and a row's bits depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor

from fused_transformer.kernels import _triton
from fused_transformer.kernels.attention.mask import Mask
from fused_transformer.kernels.attention.triton_config import Config, config

# Beside the table's own tiles: more or fewer rows, warps and stages. Those that a GPU has no room for are left out.
CANDIDATES = {
    "forward": (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 4, 3), Config(64, 64, 4, 3)),
    "forward with scores": (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 3)),
    "dq": (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    "dkdv": (Config(64, 128, 8, 2), Config(64, 64, 4, 2), Config(32, 64, 4, 2)),
}

_fastest: dict[Hashable, Config] = {}


@cache
def enabled() -> bool:
    return os.environ.get("FUSED_TRANSFORMER_AUTOTUNE") == "1" and not _triton.INTERPRETED


def tiles_for(kernel: str, q: Tensor, mask: Mask, dropout_p: float, launch: Callable[[Config], None]) -> Config:
    """The tiles for a call.

    Args:
        kernel: as `config` takes it.
        launch: runs the call with some tiles; it may be run again and again.
    """
    own = config(kernel, q)
    # A timed launch waits for the GPU, which a stream that is being captured can't; float32 has tiles of its own.
    if not enabled() or kernel not in CANDIDATES or q.dtype == torch.float32 or _capturing(q):
        return own
    kind = kernel, q.dtype, q.shape[-1], q.device, _masks(mask), dropout_p > 0
    if kind not in _fastest:
        times = {tiles: microseconds(tiles, launch) for tiles in (own, *CANDIDATES[kernel])}
        _fastest[kind] = min(times, key=lambda tiles: times[tiles])
    return _fastest[kind]


def _masks(mask: Mask) -> Hashable:
    keep = None if mask.keep is None else mask.keep.shape[2] == 1
    left, right = (limit >= 0 for limit in mask.window)
    return mask.packed, mask.causal, left, right, keep, mask.bias is None, mask.k_lengths is None


def _capturing(q: Tensor) -> bool:
    return q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def microseconds(tiles: Config, launch: Callable[[Config], None]) -> float:
    """Median of some launches; infinite where the GPU has no room for these tiles."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return 1e3 * do_bench(lambda: launch(tiles), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")
