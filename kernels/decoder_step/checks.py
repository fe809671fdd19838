"""What the arguments of decoder_step must be."""

from __future__ import annotations

import torch

from fused_transformer.kernels._checks import require_no_gradient
from fused_transformer.kernels.decoder_step.memory import Memory
from fused_transformer.kernels.decoder_step.packed import PackedDecoder
from fused_transformer.kernels.decoder_step.tokens import TokenTable


def checked(
    x, decoder, cache, length, memory, ancestors, memory_lengths, sources, beams, positions, slots, table
) -> tuple:
    """What a backend takes: the same, x contiguous. Each sentence is made only where it is said: a step has no time."""
    if not isinstance(decoder, PackedDecoder):
        raise TypeError(f"decoder must be a PackedDecoder, got {type(decoder).__name__}")
    width, heads, depth = decoder.width, decoder.num_heads, len(decoder.layers)
    if table is not None:
        x = _tokens(x, table, width)
    elif x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x must have shape (R, {width}), got {tuple(x.shape)}")
    else:
        _require("x", x, torch.float32)
    rows = x.shape[0]
    if beams < 1 or rows % beams:
        raise ValueError(f"the rows must be a multiple of beams, got {rows} and {beams}")
    if (positions is None) != (slots is None):
        raise ValueError("positions and slots must be given together")
    sequences, shape = rows // beams, cache.shape
    fits = len(shape) == 6 and (*shape[:2], shape[3], shape[5]) == (depth, 2, heads, width // heads)
    if not fits or (shape[2] < rows and slots is None):
        wanted = f"({depth}, 2, R, {heads}, room, {width // heads})"
        raise ValueError(f"cache must have shape {wanted} with R >= {rows}, got {tuple(shape)}")
    if not 0 <= length < shape[4]:
        raise ValueError(f"cache has room for {shape[4]} positions, and there are {length}")
    _require("cache", cache, torch.float32, dense=True)
    memory = _memory(memory, depth, heads, width // heads)
    if ancestors is not None:
        if ancestors.dim() != 2 or ancestors.shape[0] != rows or ancestors.shape[1] <= length:
            raise ValueError(f"ancestors must be ({rows}, more than {length}), got {tuple(ancestors.shape)}")
        _require("ancestors", ancestors, torch.int32, dense=True)
    elif slots is not None:
        raise ValueError("rows with slots of their own need ancestors, which say what they read")
    _require_sequences(memory, memory_lengths, sources, sequences)
    _require_vector("positions", positions, torch.int64, rows)
    _require_vector("slots", slots, torch.int64, rows)
    x = x.contiguous()
    return x, decoder, cache, length, memory, ancestors, memory_lengths, sources, beams, positions, slots, table


def check_ahead(
    table, decoder, memory, memory_lengths, sources, histories, scores, batch: int, size: int, length: int
) -> None:
    """Raises where `step_ahead` can't read its tensors as they lie."""
    if table.weight.shape[1] != decoder.width:
        raise ValueError(f"table must be {decoder.width} wide, got {table.weight.shape[1]}")
    _require_sequences(memory, memory_lengths, sources, batch)
    if scores is not None:
        if scores.dim() != 2 or scores.shape[0] != batch or scores.shape[1] < size:
            raise ValueError(f"scores must have shape ({batch}, {size} or more), got {tuple(scores.shape)}")
        _require("scores", scores, torch.float64, dense=True)
    if histories is not None:
        known, room = histories.ancestors.shape
        _require("ancestors", histories.ancestors, torch.int32, dense=True)
        if room < length or not all(0 <= row < known for row in histories.rows):
            raise ValueError(f"histories must be rows of ({known}, {length} or more) ancestors, got ({known}, {room})")


def _require_sequences(memory: Memory, memory_lengths, sources, sequences: int) -> None:
    """What tells sequences apart in memory."""
    if sources is None and len(memory[0][0]) < sequences:
        raise ValueError(f"memory has {len(memory[0][0])} rows for {sequences}")
    _require_vector("memory_lengths", memory_lengths, torch.int32, sequences)
    _require_vector("sources", sources, torch.int64, sequences)


def _tokens(tokens: torch.Tensor, table: TokenTable, width: int) -> torch.Tensor:
    """int64."""
    if not isinstance(table, TokenTable):
        raise TypeError(f"table must be a TokenTable, got {type(table).__name__}")
    if table.weight.shape[1] != width:
        raise ValueError(f"table must be {width} wide, got {table.weight.shape[1]}")
    if tokens.dim() != 1:
        raise ValueError(f"tokens must have shape (R,), got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int32 or int64, got {tokens.dtype}")
    if not tokens.is_cpu:
        raise ValueError(f"tokens must be on the CPU, where the packed weights are, got {tokens.device}")
    return tokens.long()


def _memory(memory, depth: int, heads: int, width: int) -> Memory:
    if type(memory) is not Memory:
        memory = Memory(memory)
    if len(memory) != depth:
        raise ValueError(f"memory must have keys and values for {depth} layers, got {len(memory)}")
    shape = memory[0][0].shape
    if shape[1] != heads or shape[3] != width:
        raise ValueError(f"memory must have shapes (B, {heads}, S, {width}), got {tuple(shape)}")
    if torch.is_grad_enabled() and memory.requires_grad:
        raise ValueError("decoder_step has no gradient, and memory requires one: use torch.no_grad()")
    return memory


def _require_vector(name: str, x: torch.Tensor | None, dtype: torch.dtype, count: int) -> None:
    if x is None:
        return
    if x.dim() != 1 or x.shape[0] != count:
        raise ValueError(f"{name} must have shape ({count},), got {tuple(x.shape)}")
    _require(name, x, dtype, dense=True)


def _require(name: str, x: torch.Tensor, dtype: torch.dtype, dense: bool = False) -> None:
    if x.dtype is dtype and x.is_cpu and not x.requires_grad and (not dense or x.stride(-1) == 1):
        return  # as it nearly always is
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, where the packed weights are, got {x.device}")
    require_no_gradient("decoder_step", **{name: x})
    if dense and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the last axis of {name} must be contiguous")
