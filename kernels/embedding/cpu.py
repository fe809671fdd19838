"""Embedding on the CPU: hands addresses to csrc/embedding, which reads a row of the table and writes a row of out."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native, _philox
from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.embedding.errors import bad_token
from fused_transformer.kernels.embedding.positions import Positions
from fused_transformer.kernels.memory import empty_result

_C = _native.library()


def refuses(tokens, table, positions, scale, padding_idx, dropout_p, seed) -> str | None:
    return _native.refuses_tensors("cpu", table=table)


def forward(tokens, table, positions: Positions | None, scale, padding_idx, dropout_p, seed):
    vocabulary, width = table.shape
    out = empty_result(*tokens.shape, width, like=table)
    rows = where = None
    if positions is not None and tokens.numel():
        rows, where = positions.rows(tokens, width)
    first_bad = _C.embedding_forward(
        ptr(tokens),
        tokens.dtype == torch.int64,
        ptr(table),
        table.stride(0),
        ptr(rows),
        ptr(where.ids if where else None),
        ptr(where.starts if where else None),
        where.start if where else 0,
        ptr(out),
        tokens.numel(),
        max(1, tokens.shape[-1]) if tokens.dim() else 1,
        vocabulary,
        width,
        -1 if padding_idx is None else padding_idx,
        scale,
        *_dropout(dropout_p, seed),
        DTYPES[table.dtype],
    )
    if first_bad >= 0:
        raise bad_token(tokens, first_bad, vocabulary)
    return out


def backward(dout: Tensor, tokens, vocabulary, scale, padding_idx, dropout_p, seed):
    count, width = tokens.numel(), dout.shape[-1]
    dout = dout.reshape(count, width)
    dtable = empty_result(vocabulary, width, like=dout)
    scratch = tokens.new_empty(count + vocabulary + 1, dtype=torch.int64)
    _C.embedding_backward(
        ptr(dout),
        dout.stride(0),
        ptr(tokens),
        tokens.dtype == torch.int64,
        ptr(scratch),
        ptr(scratch[count:]),
        ptr(dtable),
        count,
        vocabulary,
        width,
        -1 if padding_idx is None else padding_idx,
        scale,
        *_dropout(dropout_p, seed),
        DTYPES[dout.dtype],
    )
    return dtable


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int, float]:
    if dropout_p == 0.0:
        return 0, 0, 1.0
    return ptr(seed), _philox.threshold(dropout_p), _philox.keep_scale(dropout_p)
