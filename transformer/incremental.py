"""Decoding one token at a time: what a decoder keeps between steps, and the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_transformer.kernels import decode_attention
from fused_transformer.kernels.memory import empty_keys_and_values
from fused_transformer.layers import DecoderLayer

CAPACITY_STEP = 32  # positions that the cache grows by: it is copied then, and empty room would be memory for nothing


@dataclass
class DecoderState:
    """The keys and values a decoder has computed so far, for R = B · beam_size rows (B sequences, beams together).

    `Transformer.start` makes one, each `Transformer.step` appends a position to it. What is computed stays where it is:
    rows are reordered and sequences left out by changing where the others read.

    Attributes:
        memory: for each layer, keys and values of the encoder's output, (B at the start, H, S, D).
        memory_lengths: (B,), or None where all of memory is real.
        sources: (B,), which row of memory a sequence has, and all its beams. None: the one of its number.
        cache: (layers, 2, R at the start, H, capacity, D): keys and values of the positions so far; row i writes to the
            i-th. Capacity grows as needed.
        ancestors: (R, capacity) int32, which row of cache holds position j of row i's history. None: the i-th.
        length: how many positions there are.
        beam_size: rows of each sequence.
    """

    memory: Sequence[tuple[Tensor, Tensor]]
    memory_lengths: Tensor | None
    cache: Tensor
    length: int = 0
    beam_size: int = 1
    sources: Tensor | None = None
    ancestors: Tensor | None = None

    @property
    def rows(self) -> int:
        """R."""
        return self.cache.shape[2] if self.ancestors is None else self.ancestors.shape[0]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] holds; rows (R,) integers, each within its own sequence's beams."""
        if rows.shape != (self.rows,):
            raise ValueError(f"rows must have shape ({self.rows},), got {tuple(rows.shape)}")
        self._follow(rows)

    def select(self, sequences: Tensor) -> None:
        """Go on with these sequences alone: numbers among the B there are (finished ones left out, say)."""
        first = sequences * self.beam_size
        self._follow((first[:, None] + torch.arange(self.beam_size, device=first.device)).flatten())
        self.select_memory(sequences)

    def select_memory(self, sequences: Tensor) -> None:
        """Of `select`, what has a row for each sequence."""
        self.sources = sequences if self.sources is None else self.sources.index_select(0, sequences)
        if self.memory_lengths is not None:
            self.memory_lengths = self.memory_lengths.index_select(0, sequences)

    def begin_as_one(self) -> None:
        """Ahead of the first step: one row of each sequence stands for all of them, until `split`."""
        if self.length:
            raise ValueError(f"rows begin as one ahead of the first step, and there are {self.length} positions")
        sequences = torch.arange(self.rows // self.beam_size, dtype=torch.int32, device=self.cache.device)
        self.ancestors, self.beam_size = sequences[:, None].repeat(1, self.cache.shape[4]), 1

    def split(self, beam_size: int) -> None:
        """From one row of each sequence to beam_size rows that go on from it; the cache must have room for these."""
        rows = self.rows * beam_size
        if self.beam_size != 1 or rows > self.cache.shape[2]:
            raise ValueError(f"{self.rows} rows can't be split {beam_size} times in a cache for {self.cache.shape[2]}")
        self._follow(torch.arange(self.rows, device=self.cache.device).repeat_interleave(beam_size))
        self.beam_size = beam_size

    def make_room(self) -> None:
        """Space for one more position, which every row writes where no other does."""
        self.reserve(self.length + 1)
        if self.ancestors is not None:
            self.ancestors[:, self.length] = torch.arange(self.rows, device=self.ancestors.device)

    def reserve(self, positions: int) -> None:
        """Space for so many positions in all, a few more if there was none."""
        capacity = self.cache.shape[4]
        if positions <= capacity:
            return
        layers, _, rows, heads, _, width = self.cache.shape
        more = (positions - capacity + CAPACITY_STEP - 1) // CAPACITY_STEP * CAPACITY_STEP
        wider = empty_keys_and_values(layers, rows, heads, capacity + more, width, like=self.cache)
        wider[..., :capacity, :] = self.cache
        self.cache = wider
        if self.ancestors is not None:
            self.ancestors = F.pad(self.ancestors, (0, more))

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Layer `index` of the newest position gets k and v (R, H, 1, D); what `decode_attention` reads then.

        Returns:
            k_cache, v_cache, lengths and rows.
        """
        filled = self.length + 1
        here = slice(self.length, filled)  # and no number, which torch.compile would take for a constant
        keys, values = self.cache[index]
        keys[: self.rows, :, here], values[: self.rows, :, here] = k, v
        ancestors = None if self.ancestors is None else self.ancestors[:, :filled]
        return keys[:, :, :filled], values[:, :, :filled], None, ancestors

    def _follow(self, rows: Tensor) -> None:
        ancestors = self.ancestors
        if ancestors is None:
            own = torch.arange(self.rows, dtype=torch.int32, device=self.cache.device)
            ancestors = own[:, None].expand(-1, self.cache.shape[4])
        self.ancestors = ancestors.index_select(0, rows)


def start(layers: list[DecoderLayer], memory: Tensor, memory_lengths: Tensor | None, beam_size: int) -> DecoderState:
    """The state ahead of the first token."""
    projected = [layer.multihead_attn.project_keys(memory, memory) for layer in layers]
    return new_state(projected, memory, memory_lengths, beam_size)


def new_state(
    projected: Sequence[tuple[Tensor, Tensor]], memory: Tensor, memory_lengths: Tensor | None, beam_size: int
) -> DecoderState:
    """The state ahead of the first token, from each layer's keys and values of memory."""
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    batch, heads, _, width = projected[0][0].shape if projected else (len(memory), 1, 0, 1)
    cache = empty_keys_and_values(len(projected), batch * beam_size, heads, CAPACITY_STEP, width, like=memory)
    lengths = None if memory_lengths is None else memory_lengths.to(torch.int32).contiguous()
    return DecoderState(projected, lengths, cache, beam_size=beam_size)


def step_layer(layer: DecoderLayer, index: int, x: Tensor, residual: Tensor | None, state: Any):
    """Layer `index` on x (R, 1, E), the newest position; returns what a chained `DecoderLayer` returns.

    state: a DecoderState, or what appends, and has memory, its lengths and its sources, as one.
    """
    beams = (-1, state.beam_size)

    def attend(y: Tensor) -> Tensor:
        q, k, v = layer.self_attn.project(y, y, y)
        keys, values, lengths, ancestors = state.append(index, k, v)
        return layer.self_attn.merge(decode_attention(q, keys, values, lengths, rows=ancestors))

    def attend_to_memory(y: Tensor) -> Tensor:
        q = layer.multihead_attn.project_query(y)
        q = q.squeeze(2).unflatten(0, beams).transpose(1, 2)  # (B, H, beams, D): the beams read one memory
        keys, values = state.memory[index]
        heads = decode_attention(q, keys, values, state.memory_lengths, rows=state.sources, causal=False)
        return layer.multihead_attn.merge(heads.transpose(1, 2).flatten(0, 1).unsqueeze(2))

    return layer.run_sublayers((attend, attend_to_memory, layer.feed_forward), x, residual, chained=True)
