"""Batches without padding: the real tokens of all sequences one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_transformer.masks import may_look


@dataclass(frozen=True)
class Packing:
    """Where the T real tokens of a padded (B, L) batch are.

    Attributes:
        index: (T,) int64, their positions in the flattened batch.
        offsets: (B + 1,) int64: sequence b is tokens offsets[b] ... offsets[b+1] - 1 of the packed batch.
        shape: (B, L).
    """

    index: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: Tensor, shape: tuple[int, ...]) -> Packing:
        """The packing of sequences padded on the right.

        Args:
            lengths: (B,) integers, 0 ... L.
            shape: (B, L).

        Raises:
            ValueError: lengths of another shape, not integers, or out of range.
        """
        batch, length = shape
        if tuple(lengths.shape) != (batch,) or lengths.is_floating_point():
            raise ValueError(f"lengths must be {batch} integers, got {lengths.dtype} of shape {tuple(lengths.shape)}")
        if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= length:
            raise ValueError(
                f"lengths must be between 0 and {length}, got {int(lengths.min())} ... {int(lengths.max())}"
            )
        real = torch.arange(length, device=lengths.device) < lengths[:, None]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int64)
        return cls(real.flatten().nonzero()[:, 0], offsets, (batch, length))

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), 0 where there is padding."""
        batch, length = self.shape
        padded = x.new_zeros(batch * length, *x.shape[1:])
        return padded.index_copy(0, self.index, x).unflatten(0, self.shape)


def packing_if_worth_it(lengths: Tensor | None, x: Tensor) -> Packing | None:
    """The packing of x (B, L, E) where it spares the layers work, else None.

    On the CPU alone: elsewhere the host would have to wait for the device to know T, the size of everything after.
    """
    if lengths is None or x.device.type != "cpu" or not may_look(lengths):
        return None
    batch, length = x.shape[:2]
    worth_it = 0 < int(lengths.sum()) < 0.95 * batch * length
    return Packing.of(lengths, (batch, length)) if worth_it else None


def pack_memory(memory: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """memory (B, S, E) packed, and its offsets; without lengths all of it is real."""
    if lengths is None:
        lengths = torch.full((len(memory),), memory.shape[1], device=memory.device)
    packing = Packing.of(lengths, memory.shape[:2])
    return packing.pack(memory), packing.offsets
