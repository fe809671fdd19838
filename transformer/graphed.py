"""A Transformer for translation on a GPU: a decoding step of each shape is a CUDA graph, captured once and replayed.

A step of 6 layers is about 80 small kernels, whose launches take the host longer than the kernels take the GPU. A graph
is launched once. It has fixed addresses and shapes, so what a step reads and writes lies in a workspace that outlives
translations, batches are rounded up to powers of two, and the number of positions so far is a number on the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fused_transformer import incremental
from fused_transformer.kernels import forced_backend
from fused_transformer.layers import DecoderLayer
from fused_transformer.model import Transformer

POSITIONS = 64  # room for so many at first, and in steps of as many; sources are rounded up to it too
WARM_UPS = 2  # calls ahead of a capture: kernels are compiled and libraries take their memory then


class GraphedTransformer:
    """A trained `Transformer` whose decoding steps replay CUDA graphs; `generate` takes it for the model.

    It shares the model's weights: their values may change in place, but not their memory. The first step of each shape
    is captured and takes longer. Workspaces and graphs are kept, for the next translation of their shape, for as long
    as this object. It only decodes, and one thread at a time uses it.

    Args:
        model: on a CUDA device, with decoder layers; put into eval mode while it decodes.
        capture: False runs the same steps without graphs, on any device, to compare with.

    Raises:
        TypeError, ValueError: not a Transformer, without decoder layers, or not on a CUDA device.

    Source: the CUDA programming guide, "CUDA Graphs"; torch.cuda.CUDAGraph.
    """

    def __init__(self, model: Transformer, *, capture: bool = True) -> None:
        if not isinstance(model, Transformer):
            raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
        if model.config.num_decoder_layers == 0:
            raise ValueError("a model without decoder layers has no steps to capture")
        device = model.source_embedding.weight.device
        if capture and device.type != "cuda":
            raise ValueError(f"CUDA graphs are for a CUDA device, and the model is on {device}")
        self.model, self.config, self.capture = model, model.config, capture
        self._idle: dict[tuple, list[_Workspace]] = {}

    @property
    def training(self) -> bool:
        return self.model.training

    def eval(self) -> GraphedTransformer:
        self.model.eval()
        return self

    def train(self, mode: bool = True) -> GraphedTransformer:
        self.model.train(mode)
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The model's."""
        return self.model.parameters()

    def lengths(self, tokens: Tensor) -> Tensor:
        """As `Transformer.lengths`."""
        return self.model.lengths(tokens)

    def encode(self, source_tokens: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """As `Transformer.encode`."""
        return self.model.encode(source_tokens, source_lengths)

    def project(self, hidden: Tensor) -> Tensor:
        """As `Transformer.project`."""
        return self.model.project(hidden)

    @torch.no_grad()
    def start(self, memory: Tensor, memory_lengths: Tensor | None = None, *, beam_size: int = 1) -> GraphedState:
        """As `Transformer.start`. A state that is no longer used gives its workspace to the next of its shape."""
        plain = self.model.start(memory, memory_lengths, beam_size=beam_size)
        batch, source = memory.shape[:2]
        heads, width = plain.cache.shape[3], plain.cache.shape[5]
        shape = (_power_of_two(batch), beam_size, -(-max(source, 1) // POSITIONS) * POSITIONS, heads, width)
        key = (*shape, plain.cache.dtype, forced_backend())  # a graph holds the kernels that it was captured with
        idle = self._idle.setdefault(key, [])
        workspace = idle.pop() if idle else _Workspace(shape, len(plain.memory), plain.cache)
        workspace.fill(plain)
        state = GraphedState(workspace, batch)
        weakref.finalize(state, idle.append, workspace)
        return state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: GraphedState) -> Tensor:
        """As `Transformer.step`. The result is overwritten by the next step of any state."""
        workspace, rows = state.workspace, state.rows
        if state.length == workspace.capacity:
            workspace.grow()
        size = _power_of_two(rows // state.beam_size) * state.beam_size
        workspace.tokens[:rows] = tokens
        workspace.length.fill_(state.length)
        state.length += 1
        if not self.capture:
            return self._compute(workspace, size)[:rows]
        if size not in workspace.graphs:
            workspace.graphs[size] = self._captured(workspace, size)
        graph, hidden = workspace.graphs[size]
        graph.replay()
        return hidden[:rows]

    def _compute(self, workspace: _Workspace, size: int) -> Tensor:
        """The step of the first `size` rows, without a number that the host would have to know."""
        step = _Step(workspace, size)
        start = workspace.length.expand(size)
        x, residual = self.model._embed_target(workspace.tokens[:size, None], start=start), None
        for index, layer in enumerate(self.model.decoder.layers):
            x, residual = incremental.step_layer(cast(DecoderLayer, layer), index, x, residual, step)
        norm = self.model.decoder.norm
        return (x if norm is None else norm(x, residual)).squeeze(1)

    def _captured(self, workspace: _Workspace, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step, and where it leaves its result. Writing one position again does no harm."""
        device = workspace.tokens.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._compute(workspace, size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                hidden = self._compute(workspace, size)
        return graph, hidden


class GraphedState:
    """What `DecoderState` is to a Transformer; see there for reorder, select and length."""

    def __init__(self, workspace: _Workspace, batch: int) -> None:
        self.workspace, self.beam_size, self.length = workspace, workspace.beams, 0
        self._sequences = batch

    @property
    def rows(self) -> int:
        return self._sequences * self.beam_size

    def reorder(self, rows: Tensor) -> None:
        if rows.shape != (self.rows,):
            raise ValueError(f"rows must have shape ({self.rows},), got {tuple(rows.shape)}")
        ancestors = self.workspace.ancestors
        ancestors[: self.rows] = ancestors.index_select(0, rows)

    def select(self, sequences: Tensor) -> None:
        first = sequences * self.beam_size
        rows = (first[:, None] + torch.arange(self.beam_size, device=first.device)).flatten()
        workspace, count = self.workspace, len(sequences)
        self._sequences = count
        workspace.ancestors[: len(rows)] = workspace.ancestors.index_select(0, rows)
        for x in (workspace.sources, workspace.memory_lengths):
            x[:count] = x.index_select(0, sequences)


class _Workspace:
    """Everything a step reads and writes, at addresses that stay: for `batch` sequences of `beams` rows at most.

    Rows beyond those of the translation compute too, on whatever there is; they write where no other row looks.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], layers: int, like: Tensor) -> None:
        batch, self.beams, source, heads, width = shape
        device, rows = like.device, batch * self.beams
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.own = torch.arange(rows, dtype=torch.int32, device=device)
        self.ancestors = torch.zeros(rows, POSITIONS, dtype=torch.int32, device=device)
        self.sources = torch.zeros(batch, dtype=torch.int64, device=device)
        self.memory_lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        # Zeros: the rows that compute on whatever there is shall not meet NaN, which is slow on some machines.
        self.memory = like.new_zeros(layers, 2, batch, heads, source, width)
        self.cache = like.new_zeros(layers, 2, rows, heads, POSITIONS, width)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @property
    def capacity(self) -> int:
        return self.cache.shape[4]

    def fill(self, state: incremental.DecoderState) -> None:
        """Takes over what a translation begins with."""
        for mine, pair in zip(self.memory, state.memory, strict=True):
            batch, _, source, _ = pair[0].shape
            for room, x in zip(mine, pair, strict=True):
                room[:batch, :, :source] = x
        self.memory_lengths.zero_()
        self.memory_lengths[:batch] = source if state.memory_lengths is None else state.memory_lengths
        torch.arange(len(self.sources), out=self.sources)
        self.ancestors[:] = self.own[:, None]

    def grow(self) -> None:
        """Room for more positions, elsewhere: the graphs so far are of no use any more."""
        self.graphs.clear()
        wider = self.cache.new_zeros(*self.cache.shape[:4], self.capacity + POSITIONS, self.cache.shape[5])
        wider[..., : self.capacity, :] = self.cache
        ancestors = self.own[:, None].repeat(1, wider.shape[4])
        ancestors[:, : self.capacity] = self.ancestors
        self.cache, self.ancestors = wider, ancestors


class _Step:
    """The first `rows` rows of a workspace, as `incremental.step_layer` asks for them."""

    def __init__(self, workspace: _Workspace, rows: int) -> None:
        self.workspace, self.rows, self.beam_size = workspace, rows, workspace.beams
        self.memory = workspace.memory.unbind(0)
        sequences = rows // workspace.beams
        self.memory_lengths = workspace.memory_lengths[:sequences]
        self.sources = workspace.sources[:sequences]
        self.lengths = (workspace.length + 1).to(torch.int32).expand(rows).contiguous()
        workspace.ancestors[:rows].index_copy_(1, workspace.length, workspace.own[:rows, None])

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        workspace = self.workspace
        keys, values = workspace.cache[index]
        keys[: self.rows].index_copy_(2, workspace.length, k)
        values[: self.rows].index_copy_(2, workspace.length, v)
        return keys, values, self.lengths, workspace.ancestors[: self.rows]


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
