"""Keys and values of the encoder's output, for all layers of a decoder at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._checks import require
from fused_transformer.kernels._dispatch import undisturbed
from fused_transformer.kernels.linear import PackedLinear, linear
from fused_transformer.kernels.memory import empty_keys_and_values


class Memory(tuple):
    """Keys and values of the encoder's output, a pair for each layer: checked once, for many steps.

    Args:
        pairs: (B, H, S, D) float32 on the CPU each, all with one shape and the same strides, the last axis dense.

    Raises:
        ValueError: they are not like that, or there is none.
    """

    def __new__(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Memory:
        self = super().__new__(cls, ((keys, values) for keys, values in pairs))
        require(len(self) > 0, "memory must have keys and values for one layer or more")
        first = self[0][0]
        for part in (part for pair in self for part in pair):
            require(part.dim() == 4, f"memory must have shapes (B, H, S, D), got {tuple(part.shape)}")
            same = part.shape == first.shape and part.stride() == first.stride()
            require(same, "keys and values of memory must have one shape and the same strides")
            require(part.dtype == torch.float32, f"memory must be {torch.float32}, got {part.dtype}")
            on_cpu = part.device.type == "cpu"
            require(on_cpu, f"memory must be on the CPU, where the packed weights are, got {part.device}")
            dense = part.stride(-1) == 1 or part.shape[-1] <= 1
            require(dense, "the last axis of memory must be contiguous")
        return self

    def __reduce__(self):
        return Memory, (tuple(self),)  # a copy's tensors lie elsewhere

    @property
    def requires_grad(self) -> bool:
        return any(part.requires_grad for pair in self for part in pair)

    def native(self):
        """What the extension takes: addresses, made once, of tensors that then stay where they are."""
        made = self.__dict__.get("_native")
        if made is None:
            keys = self[0][0]
            made = self._native = _native.library().MemoryAddresses(
                [(keys.data_ptr(), values.data_ptr()) for keys, values in self],
                (*keys.stride()[:3], keys.shape[0], keys.shape[2]),
            )
        return made


def memory_of(
    rows: Tensor, projection: PackedLinear, heads: int, batch: int, length: int, offsets: Tensor | None
) -> Memory:
    """What `decoder_step` takes as memory.

        keys, values of layer i = the heads of rows W_iᵀ + b_i

    The product of all layers, as large as the result, is held beside it until its numbers are in their places.

    Args:
        rows: (T, E) float32, the encoder's output: packed, or all (batch · length) of it.
        projection: (layers · 2 · E, E): of each layer, of the keys and then of the values.
        heads: H.
        batch, length: of the padded batch.
        offsets: (batch + 1,) int64, where each sequence's tokens begin in rows; None: every `length`.

    Returns:
        (batch, H, length, D) float32 twice for each layer, a token's value behind its key. What lies beyond a
        sequence's tokens is not initialised.
    """
    y = linear(rows, projection)
    width = rows.shape[1]
    layers = projection.out_features // (2 * width)
    out = empty_keys_and_values(layers, batch, heads, length, width // heads, like=y)
    if _native.available() and undisturbed():
        sizes = (layers, batch, heads, length, width // heads)
        _native.library().place_memory(sizes, y.data_ptr(), _native.ptr(offsets), out.data_ptr())
    else:
        _place(y, out, offsets)
    return Memory((both[0], both[1]) for both in out)


def _place(y: Tensor, out: Tensor, offsets: Tensor | None) -> None:
    """What csrc/decoder_step/memory.h says, in plain torch."""
    layers, two, batch, heads, length, width = out.shape
    starts = [b * length for b in range(batch + 1)] if offsets is None else offsets.tolist()
    for b in range(batch):
        own = y[starts[b] : starts[b + 1]].view(-1, layers, two, heads, width)
        out[:, :, b, :, : len(own)] = own.permute(1, 2, 3, 0, 4)
