"""Decoding one token at a time: what a decoder keeps between steps, and the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_transformer.kernels import attention
from fused_transformer.layers import DecoderLayer

CAPACITY_STEP = 32  # positions; `reorder` copies unused ones too, so doubling would cost it up to half its time


@dataclass
class DecoderState:
    """The keys and values a decoder has computed so far, for R = B · beam_size rows (B sequences, beams together).

    `Transformer.start` makes one, each `Transformer.step` appends a position to it.

    Attributes:
        memory: for each layer, keys and values (B, H, S, D) of the encoder's output; a sequence's beams share them.
        memory_lengths: (B,), or None where all of memory is real.
        cache: (layers, 2, R, H, capacity, D): keys and values of the positions so far; capacity grows as needed.
        length: how many positions there are.
        beam_size: rows of each sequence.
        spare: cache's memory from before the last `reorder`, for the next one to write to.
    """

    memory: list[tuple[Tensor, Tensor]]
    memory_lengths: Tensor | None
    cache: Tensor
    length: int = 0
    beam_size: int = 1
    spare: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] holds; rows (R,) integers, each within its own sequence's beams."""
        if rows.shape != (self.cache.shape[2],):
            raise ValueError(f"rows must have shape ({self.cache.shape[2]},), got {tuple(rows.shape)}")
        # Whole, unused capacity and all: that is one run of memory a row, and one copy instead of two.
        spare = torch.empty_like(self.cache) if self.spare is None else self.spare
        torch.index_select(self.cache, 2, rows, out=spare)
        self.cache, self.spare = spare, self.cache

    def select(self, sequences: Tensor) -> None:
        """Go on with these sequences alone: numbers among the B there are (finished ones left out, say)."""
        first = sequences * self.beam_size
        rows = (first[:, None] + torch.arange(self.beam_size, device=first.device)).flatten()
        self.cache, self.spare = self.cache.index_select(2, rows), None
        self.memory = [(k.index_select(0, sequences), v.index_select(0, sequences)) for k, v in self.memory]
        if self.memory_lengths is not None:
            self.memory_lengths = self.memory_lengths.index_select(0, sequences)

    def make_room(self) -> None:
        """Space for one more position."""
        capacity = self.cache.shape[4]
        if self.length == capacity:
            wider = self.cache.new_empty(*self.cache.shape[:4], capacity + CAPACITY_STEP, self.cache.shape[5])
            wider[..., :capacity, :] = self.cache
            self.cache, self.spare = wider, None


def start(layers: list[DecoderLayer], memory: Tensor, memory_lengths: Tensor | None, beam_size: int) -> DecoderState:
    """The state ahead of the first token."""
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")
    projected = [layer.multihead_attn.project_keys(memory, memory) for layer in layers]
    batch, heads, _, width = projected[0][0].shape if projected else (len(memory), 1, 0, 1)
    cache = memory.new_empty(len(projected), 2, batch * beam_size, heads, CAPACITY_STEP, width)
    return DecoderState(projected, memory_lengths, cache, beam_size=beam_size)


def step_layer(layer: DecoderLayer, index: int, x: Tensor, residual: Tensor | None, state: DecoderState):
    """Layer `index` on x (R, 1, E), the newest position; returns what a chained `DecoderLayer` returns."""
    keys, values = state.cache[index]
    here = state.length
    beams = (-1, state.beam_size)

    def attend(y: Tensor) -> Tensor:
        q, k, v = layer.self_attn.project(y, y, y)
        keys[:, :, here], values[:, :, here] = k[:, :, 0], v[:, :, 0]
        return layer.self_attn.merge(attention(q, keys[:, :, : here + 1], values[:, :, : here + 1]))

    def attend_to_memory(y: Tensor) -> Tensor:
        q = layer.multihead_attn.project_query(y)
        q = q.squeeze(2).unflatten(0, beams).transpose(1, 2)  # (B, H, beams, D): the beams read one memory
        heads = attention(q, *state.memory[index], k_lengths=state.memory_lengths)
        return layer.multihead_attn.merge(heads.transpose(1, 2).flatten(0, 1).unsqueeze(2))

    return layer.run_sublayers((attend, attend_to_memory, layer.feed_forward), x, residual, chained=True)
