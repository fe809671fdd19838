"""The embedding as direct calls, also where a gradient is wanted (csrc/embedding/bind_direct.cpp)."""

from __future__ import annotations

import math

import torch

from fused_transformer.kernels import _direct
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.embedding import positions as tables
from fused_transformer.kernels.embedding.checks import check_tensors
from fused_transformer.kernels.embedding.positions import make_positions

forward = _direct.call("embedding_direct")
_backward = _direct.call("embedding_backward_direct")


class _Embedding(torch.autograd.Function):
    """A call of which `forward` said that a gradient is wanted; its arguments, with the table first."""

    @staticmethod
    def forward(ctx, table, tokens, layout, scale, start, padding_idx, dropout_p, seed):
        out = forward(tokens, table, layout, tables.TABLES, scale, start, padding_idx, dropout_p, seed)
        padding_idx = check_tensors(tokens, table, padding_idx)
        scale = math.sqrt(table.shape[1]) if scale is None else float(scale)
        if out is None:  # a token outside the vocabulary; or something began to look on since it was asked
            chosen = make_positions(tokens, layout, start, None)
            rest = (chosen, scale, padding_idx, float(dropout_p), seed)
            out = OPS["embedding"].on(table).forward(tokens, table, *rest)
        ctx.save_for_backward(tokens, seed)
        ctx.rest = (len(table), scale, padding_idx, float(dropout_p))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        tokens, seed = ctx.saved_tensors
        dtable = _backward(dout, tokens, *ctx.rest, seed)
        if dtable is None:
            dtable = OPS["embedding"].on(dout).backward(dense_last(dout), tokens, *ctx.rest, seed)
        return dtable, None, None, None, None, None, None, None


differentiated = applied_directly(_Embedding)
