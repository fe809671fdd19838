"""Token embedding: dropout(table[token] · scale + PE[position]), with three kinds of sinusoidal positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels._checks import dense_last, require_dropout
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.embedding import compiled, differentiated
from fused_transformer.kernels.embedding.checks import check_tensors
from fused_transformer.kernels.embedding.positions import Layout, make_positions, sinusoidal_positions

__all__ = ["embedding", "op", "sinusoidal_positions"]

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))


def embedding(
    tokens: Tensor,
    table: Tensor,
    *,
    positions: Layout | None = "interleaved",
    scale: float | None = None,
    start: int | Tensor = 0,
    position_ids: Tensor | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Token embedding, scale, sinusoidal positions and dropout in one pass.

        out[b, l] = dropout(scale · table[tokens[b, l]] + PE[start[b] + l])

    Args:
        tokens: (B, L), or any shape whose last axis is the sequence; int32 or int64, any strides.
        table: (V, E), float32, float16, bfloat16 or float64 (reference only); any strides.
        positions: "interleaved" (the paper's), "concat_t2t", "concat_paper": see `sinusoidal_positions`; None: no
            positions are added. No length is too long: the table behind them grows.
        scale: default √E.
        start: the position of the first token of each row: one number, or integers of shape tokens.shape[:-1], (B,).
        position_ids: int32 or int64, broadcastable to tokens: the position of each token, in place of `start`.
        padding_idx: tokens of this number give rows of zeros (positions too), and no gradient. Negative: from the
            table's end.
        dropout_p: probability of zeroing an element; the others are scaled by 1 / (1 - p).
        seed: (1,) int64 on the table's device; the mask is a function of it alone. Default: drawn from
            torch's generator.

    Returns:
        (*tokens.shape, E) of table's dtype. Differentiable in table; the gradient is dense.

    Raises:
        IndexError: a token is outside the vocabulary: the sentence says which, and where. On a GPU, where
            looking would wait for it, "cuda" and "triton" make that token's row NaN instead, and give it no gradient.
        ValueError: shapes, dtypes or devices do not fit, or a position is negative or beyond 2^53; the sentence says
            which.
        TypeError: tokens or table is no tensor.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32, positions computed in float64. The gradient is summed in float32, in an order that
        the tokens alone decide: the same bits on every run and with any number of threads.
    Source: Vaswani et al. 2017, sections 3.4 and 3.5.
    """
    if position_ids is None and not torch.compiler.is_compiling():
        out = differentiated.directly(tokens, table, positions, scale, start, padding_idx, dropout_p, seed)
        if out is not None:
            return out
    if routed(table):
        return compiled.embedding(tokens, table, positions, scale, start, position_ids, padding_idx, dropout_p, seed)
    padding_idx = check_tensors(tokens, table, padding_idx)
    chosen = make_positions(tokens, positions, start, position_ids)
    require_dropout(dropout_p, seed, table.device)
    seed = seed_for(table, dropout_p, seed)
    scale = math.sqrt(table.shape[1]) if scale is None else float(scale)
    rest = (chosen, scale, padding_idx, float(dropout_p))
    table, tokens = dense_last(table), tokens.contiguous()
    # forward-mode AD: autograd must see the call to refuse it
    if (table.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return differentiated.apply(table, tokens, seed, *rest)
    arguments = (tokens, table, *rest, seed)
    return op.pick(*arguments).forward(*arguments)  # decoding a token, autograd is half the time
