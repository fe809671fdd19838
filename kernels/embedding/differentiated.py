"""The embedding as autograd sees it: one Function for direct calls (csrc/embedding/bind_direct.cpp) and for all
backends. The table itself is not saved: its gradient does not depend on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.embedding import positions as tables
from fused_transformer.kernels.embedding.positions import Positions, make_positions

direct_call = _direct.call("embedding_direct")
_direct_backward = _direct.call("embedding_backward_direct")


class Placed(NamedTuple):
    """Where the tokens stand, as a direct call has it."""

    layout: str | None
    start: int


class _Embedding(torch.autograd.Function):
    """place: Placed for a direct call; what `make_positions` made for the long way."""

    @staticmethod
    def forward(
        ctx, table, tokens, seed, place: Placed | Positions | None, scale: float, padding_idx, dropout_p: float
    ):
        out = backend = None
        if isinstance(place, Placed):
            layout, start = place
            out = direct_call(tokens, table, layout, tables.TABLES, scale, start, padding_idx, dropout_p, seed, True)
            if out is None:  # a token is outside the vocabulary, if nothing else
                place = make_positions(tokens, layout, start, None)
        if out is None:
            arguments = (tokens, table, place, scale, padding_idx, dropout_p, seed)
            backend = OPS["embedding"].pick(*arguments)
            out = backend.forward(*arguments)
        ctx.save_for_backward(tokens, seed)
        ctx.backend, ctx.rest = backend, (len(table), scale, padding_idx, dropout_p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        tokens, seed = ctx.saved_tensors
        dtable = _direct_backward(dout, tokens, *ctx.rest, seed) if ctx.backend is None else None
        if dtable is None:
            backend = ctx.backend or OPS["embedding"].on(dout)
            dtable = backend.backward(dense_last(dout), tokens.contiguous(), *ctx.rest, seed)
        return dtable, None, None, None, None, None, None


apply = _Embedding.apply
_apply_directly = applied_directly(_Embedding)


def _context(_saved: tuple, constants: tuple) -> dict:
    return {"backend": None, "rest": constants}


_PLAN = _node.Plan(
    "FusedEmbeddingBackward",
    _Embedding,
    _context,
    backward="embedding_backward_direct",
    sources="g0 s0 c0 c1 c2 c3 s1",
    inputs=(0,),
)


def directly(tokens, table, layout, scale, start, padding_idx, dropout_p, seed):
    """out of a direct call; None where it is not for one."""
    keep, place = _node.KEEP, (layout, tables.TABLES, scale, start, padding_idx, dropout_p)
    out = direct_call(tokens, table, *place, seed, keep)
    lacking = out is True  # the seed, if no node is made by Python
    if lacking:
        seed = seed_for(table, dropout_p, seed)
        out = None if keep is False else direct_call(tokens, table, *place, seed, keep)
    if not lacking and type(out) is not list:
        return out
    scale = math.sqrt(table.shape[1]) if scale is None else float(scale)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(table)
    if type(out) is not list:
        return _apply_directly(table, tokens, seed, Placed(layout, start), scale, padding_idx, float(dropout_p))
    (out,) = out
    _PLAN.attach((out,), (table,), (tokens, seed), (len(table), scale, padding_idx, float(dropout_p)))
    return out
