"""Embedding written from the paper in plain torch: the meaning every other backend is tested against.

Any device, any float dtype; arithmetic in the table's dtype, positions computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _philox
from fused_transformer.kernels._checks import has_numbers
from fused_transformer.kernels.embedding.errors import bad_token
from fused_transformer.kernels.embedding.positions import Positions, sinusoids


def refuses(*_args) -> None:
    return None


def forward(tokens, table, positions: Positions | None, scale, padding_idx, dropout_p, seed):
    outside = (tokens < 0) | (tokens >= len(table))
    if has_numbers(outside) and outside.any():
        raise bad_token(tokens, int(outside.flatten().nonzero()[0]), len(table))
    out = table[tokens.long()] * scale
    if positions is not None:
        out = out + sinusoids(positions.of(tokens), table.shape[1], positions.layout).to(table.dtype)
    return torch.where(_kept(out, tokens, padding_idx, dropout_p, seed), out * _factor(dropout_p), 0)


def backward(dout, tokens, vocabulary, scale, padding_idx, dropout_p, seed):
    dout = torch.where(_kept(dout, tokens, padding_idx, dropout_p, seed), dout * _factor(dropout_p), 0)
    rows = dout.reshape(tokens.numel(), dout.shape[-1])
    # index_put_ with accumulate is the deterministic one of torch's scatters, on a GPU too
    dtable = dout.new_zeros(vocabulary, dout.shape[-1])
    return dtable.index_put_((tokens.flatten().long(),), rows * scale, accumulate=True)


def _kept(out: Tensor, tokens: Tensor, padding_idx: int | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """bool, broadcastable to out: False where padding or dropout makes a zero."""
    kept = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)[..., None]
    if padding_idx is not None:
        kept = (tokens != padding_idx)[..., None]
    if dropout_p > 0.0:
        kept = kept & _philox.keep_rows(seed, dropout_p, tokens.numel(), out.shape[-1]).view(out.shape)
    return kept


def _factor(dropout_p: float) -> float:
    return _philox.keep_scale(dropout_p) if dropout_p > 0.0 else 1.0
