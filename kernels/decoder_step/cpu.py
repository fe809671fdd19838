"""decoder_step in C++ for the CPU; see csrc/decoder_step."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels.decoder_step import native

_native.library()


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
    table,
):
    looked_up, positions_of_tokens = (None, None) if table is None else table.native(length + 1)
    out = cache.new_empty(x.shape[0], decoder.width)
    bad = decoder.native.step(
        (x.shape[0], beams, length),
        x.data_ptr(),
        out.data_ptr(),
        native.of_cache(cache),
        (0, 0) if ancestors is None else (ancestors.data_ptr(), ancestors.stride(0)),
        memory.native(),
        (_native.ptr(memory_lengths), _native.ptr(sources)),
        (_native.ptr(positions), _native.ptr(slots)),
        native.seconds(),
        looked_up,
    )
    del positions_of_tokens  # they had to lie there until now
    if bad >= 0:
        table.embed(x, length)  # which says so
    return out
