"""decoder_step in C++ for the CPU; see csrc/decoder_step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_transformer.kernels import _native

_native.library()
_seconds: Tensor | None = None


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


def refuses(_x, decoder, *_args) -> str | None:
    return "the weights were packed without the compiled extension" if decoder.native is None else None


def forward(
    x: Tensor,
    decoder,
    cache: Tensor,
    length: int,
    memory,
    ancestors,
    memory_lengths,
    sources,
    beams: int,
    positions,
    slots,
):
    out = x.new_empty(x.shape)
    keys = memory[0][0]
    decoder.native.step(
        (x.shape[0], beams, length),
        x.data_ptr(),
        out.data_ptr(),
        (cache.data_ptr(), (*cache.stride()[:5], cache.shape[2])),
        (0, 0) if ancestors is None else (ancestors.data_ptr(), ancestors.stride(0)),
        [(k.data_ptr(), v.data_ptr()) for k, v in memory],
        (*keys.stride()[:3], keys.shape[0], keys.shape[2]),
        (_native.ptr(memory_lengths), _native.ptr(sources)),
        (_native.ptr(positions), _native.ptr(slots)),
        _native.ptr(_seconds),
    )
    return out
