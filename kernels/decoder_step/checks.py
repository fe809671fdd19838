"""What the arguments of decoder_step must be."""

from __future__ import annotations

import torch

from fused_transformer.kernels._checks import require, require_no_gradient
from fused_transformer.kernels.decoder_step.memory import Memory
from fused_transformer.kernels.decoder_step.packed import PackedDecoder
from fused_transformer.kernels.decoder_step.tokens import TokenTable


def checked(
    x, decoder, cache, length, memory, ancestors, memory_lengths, sources, beams, positions, slots, table
) -> tuple:
    """What a backend takes: the same, x contiguous."""
    if not isinstance(decoder, PackedDecoder):
        raise TypeError(f"decoder must be a PackedDecoder, got {type(decoder).__name__}")
    width, heads, depth = decoder.width, decoder.num_heads, len(decoder.layers)
    if table is None:
        require(x.dim() == 2 and x.shape[1] == width, f"x must have shape (R, {width}), got {tuple(x.shape)}")
        _require("x", x, torch.float32)
    else:
        x = _tokens(x, table, width)
    rows = x.shape[0]
    require(beams >= 1 and rows % beams == 0, f"the rows must be a multiple of beams, got {rows} and {beams}")
    sequences = rows // beams
    fits = cache.dim() == 6 and (*cache.shape[:2], cache.shape[3], cache.shape[5]) == (depth, 2, heads, width // heads)
    shape = f"({depth}, 2, R, {heads}, room, {width // heads})"
    require((positions is None) == (slots is None), "positions and slots must be given together")
    require(
        fits and (cache.shape[2] >= rows or slots is not None),
        f"cache must have shape {shape} with R >= {rows}, got {tuple(cache.shape)}",
    )
    require(0 <= length < cache.shape[4], f"cache has room for {cache.shape[4]} positions, and there are {length}")
    if type(memory) is not Memory:
        memory = Memory(memory)
    require(len(memory) == depth, f"memory must have keys and values for {depth} layers, got {len(memory)}")
    first = memory[0][0]
    fits = first.shape[1] == heads and first.shape[3] == width // heads
    require(fits, f"memory must have shapes (B, {heads}, S, {width // heads}), got {tuple(first.shape)}")
    if torch.is_grad_enabled() and memory.requires_grad:
        raise ValueError("decoder_step has no gradient, and memory requires one: use torch.no_grad()")
    _require("cache", cache, torch.float32, dense=True)
    if ancestors is not None:
        fits = ancestors.dim() == 2 and ancestors.shape[0] == rows and ancestors.shape[1] > length
        require(fits, f"ancestors must be ({rows}, more than {length}), got {tuple(ancestors.shape)}")
        _require("ancestors", ancestors, torch.int32, dense=True)
    elif slots is not None:
        raise ValueError("rows with slots of their own need ancestors, which say what they read")
    vectors = (
        ("memory_lengths", memory_lengths, torch.int32, sequences),
        ("sources", sources, torch.int64, sequences),
        ("positions", positions, torch.int64, rows),
        ("slots", slots, torch.int64, rows),
    )
    for name, vector, dtype, count in vectors:
        if vector is not None:
            require(vector.shape == (count,), f"{name} must have shape ({count},), got {tuple(vector.shape)}")
            _require(name, vector, dtype, dense=True)
    require(sources is not None or first.shape[0] >= sequences, f"memory has {first.shape[0]} rows for {sequences}")
    x = x.contiguous()
    return x, decoder, cache, length, memory, ancestors, memory_lengths, sources, beams, positions, slots, table


def _tokens(tokens: torch.Tensor, table: TokenTable, width: int) -> torch.Tensor:
    """int64."""
    if not isinstance(table, TokenTable):
        raise TypeError(f"table must be a TokenTable, got {type(table).__name__}")
    require(table.weight.shape[1] == width, f"table must be {width} wide, got {table.weight.shape[1]}")
    require(tokens.dim() == 1, f"tokens must have shape (R,), got {tuple(tokens.shape)}")
    integers = tokens.dtype in (torch.int64, torch.int32)
    require(integers, f"tokens must be int32 or int64, got {tokens.dtype}")
    require(tokens.is_cpu, f"tokens must be on the CPU, where the packed weights are, got {tokens.device}")
    return tokens.long()


def _require(name: str, x: torch.Tensor, dtype: torch.dtype, dense: bool = False) -> None:
    if x.dtype is dtype and x.is_cpu and not x.requires_grad and (not dense or x.stride(-1) == 1):
        return  # as it nearly always is
    require(x.dtype == dtype, f"{name} must be {dtype}, got {x.dtype}")
    require(x.device.type == "cpu", f"{name} must be on the CPU, where the packed weights are, got {x.device}")
    require_no_gradient("decoder_step", **{name: x})
    if dense:
        require(x.stride(-1) == 1 or x.shape[-1] <= 1, f"the last axis of {name} must be contiguous")
