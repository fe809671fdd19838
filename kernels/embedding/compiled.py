"""Embedding as operators of torch; see kernels/_compile.py. Tokens and positions are looked at when the node runs."""

from __future__ import annotations

import math

from torch import Tensor

from fused_transformer.kernels._checks import dense_last, require_dropout
from fused_transformer.kernels._compile import operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import new_seed
from fused_transformer.kernels.embedding import reference
from fused_transformer.kernels.embedding.checks import check_tensors
from fused_transformer.kernels.embedding.positions import make_positions


def embedding(tokens, table, positions, scale, start, position_ids, padding_idx, dropout_p, seed):
    """`embedding` as one node."""
    if dropout_p > 0.0 and seed is None:
        seed = new_seed(table.device)
    first, starts = (0, start) if isinstance(start, Tensor) else (start, None)
    return _embedding(table, tokens, positions, scale, first, starts, position_ids, padding_idx, dropout_p, seed)


def _checked(table, tokens, positions, scale, start, starts, position_ids, padding_idx, dropout_p, seed):
    """What a backend takes after tokens and table."""
    padding_idx = check_tensors(tokens, table, padding_idx)
    chosen = make_positions(tokens, positions, start if starts is None else starts, position_ids)
    require_dropout(dropout_p, seed, table.device)
    return chosen, math.sqrt(table.shape[1]) if scale is None else scale, padding_idx, dropout_p, seed


def _forward(table, tokens, *rest):
    rest = _checked(table, tokens, *rest)
    table, tokens = dense_last(table), tokens.contiguous()
    return OPS["embedding"].pick(tokens, table, *rest).forward(tokens, table, *rest)


def _forward_fake(table, tokens, *rest):
    _checked(table, tokens, *rest)
    return table.new_empty((*tokens.shape, table.shape[1]))


def _forward_plain(table, tokens, *rest):
    return reference.forward(tokens, table, *_checked(table, tokens, *rest))


def _save(ctx, inputs, output):
    table, tokens, _, scale, _, _, _, padding_idx, dropout_p, seed = inputs
    ctx.save_for_backward(tokens, seed)
    vocabulary, width = table.shape
    padding_idx = None if padding_idx is None else padding_idx % vocabulary
    ctx.rest = vocabulary, math.sqrt(width) if scale is None else scale, padding_idx, dropout_p


def _gradients(ctx, dout):
    tokens, seed = ctx.saved_tensors
    return _call_backward(dout, tokens, *ctx.rest, seed), *(None,) * 9


def _backward(dout, tokens, *rest):
    vocabulary, *options = rest
    dout, tokens = dense_last(dout), tokens.contiguous()
    backend = OPS["embedding"].pick(tokens, dout, None, *options)  # dout for the table, which was not saved
    return backend.backward(dout, tokens, vocabulary, *options)


def _backward_fake(dout, tokens, vocabulary, *_):
    return dout.new_empty((vocabulary, dout.shape[-1]))


_call_backward = operator(
    "embedding_backward(Tensor dout, Tensor tokens, SymInt vocabulary, float scale, SymInt? padding_idx, "
    "float dropout_p, Tensor? seed) -> Tensor",
    run=_backward,
    fake=_backward_fake,
)
_embedding = operator(
    "embedding(Tensor table, Tensor tokens, str? positions, float? scale, SymInt start, Tensor? starts, "
    "Tensor? position_ids, SymInt? padding_idx, float dropout_p, Tensor? seed) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    plain=_forward_plain,
    save=_save,
    backward=_gradients,
)
