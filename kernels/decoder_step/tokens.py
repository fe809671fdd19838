"""The table that a step looks its tokens up in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels.embedding import Layout, embedding, sinusoidal_positions

FEWEST_POSITIONS = 512  # of what is kept; doubled as it is outgrown


class TokenTable:
    """What becomes of a token: `embedding` of it, scaled by √E.

    Args:
        weight: (V, E) float32 on the CPU, contiguous, without gradients.
        positions: the layout of positions that are added; None: none are.
        padding_idx: the token whose rows are 0; None: there is none.

    Raises:
        ValueError: the weight is not like that.
    """

    def __init__(self, weight: Tensor, positions: Layout | None, padding_idx: int | None) -> None:
        fits = weight.dim() == 2 and weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
        if not fits or weight.requires_grad:
            raise ValueError("a step's table must be (V, E) float32 on the CPU, contiguous, without gradients")
        self.weight, self.positions, self.padding_idx = weight, positions, padding_idx
        self._positions: Tensor | None = None  # (P, E), for the extension

    def embed(self, tokens: Tensor, position: int | Tensor) -> Tensor:
        """tokens (R,) at one position, or at (R,): (R, E). IndexError where one is not in the table."""
        if self.positions is None:
            position = 0
        x = embedding(
            tokens[:, None], self.weight, positions=self.positions, start=position, padding_idx=self.padding_idx
        )
        return x.squeeze(1)

    def native(self, end: int) -> tuple[tuple[tuple[int, ...], float], Tensor | None]:
        """What the extension takes, for positions below `end`, and the tensor that must outlive its use."""
        vocabulary, width = self.weight.shape
        padding = -1 if self.padding_idx is None else self.padding_idx % vocabulary
        positions = self._positions  # another thread may put a longer one in its place
        if self.positions is not None and (positions is None or len(positions) < end):
            rows = 1 << (max(end, FEWEST_POSITIONS) - 1).bit_length()
            positions = self._positions = sinusoidal_positions(rows, width, layout=self.positions, device="cpu")
        place = (_native.ptr(positions), 0 if positions is None else len(positions))
        return ((self.weight.data_ptr(), vocabulary, *place, padding), math.sqrt(width)), positions
