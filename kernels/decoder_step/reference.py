"""decoder_step out of the ops that it is made of: the meaning the native one is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_transformer.kernels.decode_attention import decode_attention
from fused_transformer.kernels.linear import linear


def refuses(*_args) -> None:
    return None


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
    if table is not None:
        x = table.embed(x, length if positions is None else positions)
    rows, width = x.shape
    heads, filled = decoder.num_heads, length + 1
    own = torch.arange(rows, dtype=torch.int32, device=x.device)
    table = own[:, None].expand(-1, filled) if ancestors is None else ancestors[:, :filled]
    where = torch.arange(rows // beams, device=x.device) if sources is None else sources
    histories = None
    if positions is None:
        positions, slots = torch.full((rows,), length, device=x.device), own.long()
    else:
        _require_within("positions", positions, length)
        _require_within("slots", slots, cache.shape[2] - 1)
        histories = positions + 1

    def norm(y: Tensor, parameters) -> Tensor:
        return F.layer_norm(y, (width,), *parameters, eps=decoder.eps)

    for index, layer in enumerate(decoder.layers):
        keys, values = cache[index]

        def attend(y: Tensor, layer=layer, keys=keys, values=values) -> Tensor:
            q, k, v = linear(y, layer.qkv).view(rows, 3, heads, 1, -1).unbind(1)
            keys[slots, :, positions], values[slots, :, positions] = k[:, :, 0], v[:, :, 0]
            seen = decode_attention(q, keys[:, :, :filled], values[:, :, :filled], histories, rows=table)
            return seen.reshape(rows, width)

        def look(y: Tensor, layer=layer, pair=memory[index]) -> Tensor:
            q = linear(y, layer.query).view(-1, beams, heads, width // heads).transpose(1, 2)
            seen = decode_attention(q, *pair, memory_lengths, rows=where, causal=False)
            return seen.transpose(1, 2).reshape(rows, width)

        def widen(y: Tensor, layer=layer) -> Tensor:
            return linear(y, layer.up, activation=decoder.activation)

        sublayers = ((attend, layer.self_out), (look, layer.memory_out), (widen, layer.down))
        for (inner, last), parameters in zip(sublayers, layer.norms, strict=True):
            if decoder.norm_first:
                x = linear(inner(norm(x, parameters)), last, residual=x)
            else:
                x = norm(linear(inner(x), last, residual=x), parameters)
    return x if decoder.final_norm is None else norm(x, decoder.final_norm)


def _require_within(name: str, numbers: Tensor, most: int) -> None:
    wrong = numbers[(numbers < 0) | (numbers > most)]
    if len(wrong):
        raise ValueError(f"{name} must be between 0 and {most}, got {int(wrong[0])}")
