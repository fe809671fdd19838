"""What the native calls of this folder share: how a cache is passed to bind.cpp, and the clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_transformer.kernels import _native

_seconds: Tensor | None = None


def of_cache(cache: Tensor) -> tuple[int, tuple[int, ...]]:
    return cache.data_ptr(), (*cache.stride()[:5], cache.shape[2])


def seconds() -> int:
    """The address of the clock of `timing`; 0: nobody asks."""
    return _native.ptr(_seconds)


@contextmanager
def timing() -> Iterator[Tensor]:
    """A tensor (3,) float64 to which every step inside the block adds the seconds of its products, attention and norms.

    Two clock readings for each of the dozen kernels of a layer: about 5 µs a step of six.
    """
    global _seconds
    before, _seconds = _seconds, torch.zeros(3, dtype=torch.float64, device="cpu")
    try:
        yield _seconds
    finally:
        _seconds = before
