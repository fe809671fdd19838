"""Attention as direct calls, also where a gradient is wanted (csrc/attention/bind_direct.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_transformer.kernels import _direct
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.attention.mask import make_mask

forward = _direct.call("attention_direct")
_backward = _direct.call("attention_backward_direct")


def differentiated(q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed):
    """(out, lse) of a call of which `forward` said that a gradient is wanted."""
    masks = (keep, causal, window, k_lengths, q_offsets, k_offsets)
    return _apply(q, k, v, bias, masks, scale, dropout_p, seed_for(q, dropout_p, seed))


class _Attention(torch.autograd.Function):
    """Takes the masks as `attention` does: a Mask is made of them where the backward pass must go the long way."""

    @staticmethod
    def forward(ctx, q, k, v, bias, masks: tuple, scale, dropout_p, seed):
        keep, *others = masks
        both = forward(q, k, v, keep, bias, *others, scale, dropout_p, seed, True)
        if both is None:  # something began to look on since it was asked
            arguments = _for_a_backend(q, k, keep, bias, *others, scale, dropout_p, seed)
            both = OPS["attention"].on(q).forward(q, k, v, *arguments)
        out, lse = both
        ctx.save_for_backward(q, k, v, keep, bias, seed, out, lse)
        ctx.others, ctx.scale, ctx.dropout_p = others, scale, dropout_p
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse):
        q, k, v, keep, bias, seed, out, lse = ctx.saved_tensors
        rest = (ctx.scale, ctx.dropout_p, seed)
        if not ctx.needs_input_grad[3]:
            gradients = _backward(q, k, v, keep, bias, *ctx.others, *rest, dout, out, lse)
            if gradients is not None:
                return *gradients, None, None, None, None, None
        arguments = _for_a_backend(q, k, keep, bias, *ctx.others, *rest)
        backend, wants_dbias = OPS["attention"].on(q), ctx.needs_input_grad[3]
        dq, dk, dv, dbias = backend.backward(dense_last(dout), q, k, v, out, lse, *arguments, wants_dbias)
        return dq, dk, dv, dbias.reshape(bias.shape) if wants_dbias else None, None, None, None, None


_apply = applied_directly(_Attention)


def _for_a_backend(q: Tensor, k: Tensor, keep, bias, *others) -> tuple:
    """What the long way passes on behind q, k and v."""
    causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed = others
    mask = make_mask(
        q,
        k,
        keep=keep,
        bias=bias,
        causal=causal,
        window=window,
        k_lengths=k_lengths,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
    )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return mask, scale, float(dropout_p), seed
