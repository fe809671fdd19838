"""Embedding in CUDA C++, for tensors on a GPU; see csrc/embedding. device.py has what becomes of bad tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _cuda, _philox
from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.embedding.device import check_tokens, chunk_of, position_source
from fused_transformer.kernels.embedding.positions import Positions

_C = _cuda.library()


def refuses(tokens, table, positions, scale, padding_idx, dropout_p, seed) -> str | None:
    return _cuda.refuses_tensors(table=table)


def forward(tokens, table, positions: Positions | None, scale, padding_idx, dropout_p, seed):
    vocabulary, width = table.shape
    out = table.new_empty(*tokens.shape, width)
    if out.numel() == 0:
        return out
    check_tokens(tokens, vocabulary)
    rows, waves = position_source(positions, tokens, width)
    with _cuda.current(table):
        _cuda.on_current_stream(_C.embedding_forward_cuda, table)(
            *(ptr(tokens), tokens.dtype == torch.int64, ptr(table), table.stride(0), ptr(rows), ptr(waves)),
            *(ptr(positions.ids), ptr(positions.starts), positions.start) if positions else (0, 0, 0),
            *(ptr(out), tokens.numel(), tokens.shape[-1] if tokens.dim() else 1, vocabulary, width),
            *(-1 if padding_idx is None else padding_idx, scale, *_dropout(dropout_p, seed), DTYPES[table.dtype]),
        )
    return out


def backward(dout: Tensor, tokens, vocabulary, scale, padding_idx, dropout_p, seed):
    count, width = tokens.numel(), dout.shape[-1]
    dtable = dout.new_zeros(vocabulary, width)
    if count == 0 or dtable.numel() == 0:
        return dtable
    dout = dout.reshape(count, width)
    ordered, order = torch.sort(tokens.flatten(), stable=True)
    chunk = chunk_of(count)
    chunks = -(-count // chunk)
    partial = dout.new_empty(2, chunks, width, dtype=torch.float32) if chunks > 1 else None
    with _cuda.current(dout):
        _cuda.on_current_stream(_C.embedding_backward_cuda, dout)(
            *(ptr(dout), dout.stride(0), ptr(ordered), ordered.dtype == torch.int64, ptr(order)),
            *(ptr(dtable), ptr(partial), count, vocabulary, width, chunk),
            *(-1 if padding_idx is None else padding_idx, scale, *_dropout(dropout_p, seed), DTYPES[dout.dtype]),
        )
    return dtable


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int, float]:
    if dropout_p == 0.0:
        return 0, 0, 1.0
    return ptr(seed), _philox.threshold(dropout_p), _philox.keep_scale(dropout_p)
