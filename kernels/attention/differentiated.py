"""Attention as autograd sees it: one Function for direct calls (csrc/attention/bind_direct.cpp) and for all backends.

Both ways save the same tensors, in the order and shapes of the call: a checkpoint's second forward pass may go the
other way, if only because the first call of a process on a GPU never is direct.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.attention.mask import Mask, make_mask

direct_call = _direct.call("attention_direct")
_direct_backward = _direct.call("attention_backward_direct")


def to_save(mask: Tensor | None) -> Tensor | None:
    """A mask, lengths or offsets for save_for_backward, which takes nothing that was made in inference mode."""
    return mask.clone() if mask is not None and mask.is_inference() else mask


class Others(NamedTuple):
    """The masks that are no operands, as the caller gave them."""

    causal: object
    window: tuple[int, int] | None
    k_lengths: Tensor | None
    q_offsets: Tensor | None
    k_offsets: Tensor | None


class _Attention(torch.autograd.Function):
    """mask: what the long way made of keep, bias and others; None for a direct call."""

    @staticmethod
    def forward(ctx, q, k, v, keep, bias, seed, others: Others, mask: Mask | None, scale: float, dropout_p: float):
        both = backend = None
        if mask is None:
            both = direct_call(q, k, v, keep, bias, *others, scale, dropout_p, seed, True, True)
        if both is None:
            mask = _mask(q, k, keep, bias, others) if mask is None else mask
            arguments = (q, k, v, mask, scale, dropout_p, seed)
            backend = OPS["attention"].pick(*arguments)
            out, lse = backend.forward(*arguments)
            both = out.detach(), lse  # for autograd no view, as the reference's is: nobody could write to it
        out, lse = both
        # the masks too, so that changing one in place before backward is an error
        ctx.save_for_backward(q, k, v, to_save(keep), bias, seed, out, lse, *map(to_save, others[2:]))
        ctx.backend, ctx.seen, ctx.mask, ctx.scale, ctx.dropout_p = backend, others[:2], mask, scale, dropout_p
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _dlse=None):
        q, k, v, keep, bias, seed, out, lse, *tensors = ctx.saved_tensors
        others = Others(*ctx.seen, *tensors)
        backend, mask, wants_dbias = ctx.backend, ctx.mask, ctx.needs_input_grad[4]
        gradients = None
        if backend is None and not wants_dbias:
            arguments = (q, k, v, keep, bias, *others, ctx.scale, ctx.dropout_p, seed)
            gradients = _direct_backward(*arguments, dout, out, lse)
        if gradients is not None:
            return *gradients, None, None, None, None, None, None, None
        backend = backend or OPS["attention"].on(q)
        dout, q, k, v, out = (dense_last(x) for x in (dout, q, k, v, out))  # a hook may have packed them otherwise
        mask = _mask(q, k, keep, bias, others) if mask is None else mask
        rest = (mask, ctx.scale, ctx.dropout_p, seed, wants_dbias)
        dq, dk, dv, dbias = backend.backward(dout, q, k, v, out, lse, *rest)
        dbias = dbias.reshape(bias.shape) if wants_dbias else None
        return dq, dk, dv, None, dbias, None, None, None, None, None


_apply_directly = applied_directly(_Attention)


def _context(_saved: tuple, constants: tuple) -> dict:
    causal, window, scale, dropout_p = constants
    return {"backend": None, "mask": None, "seen": (causal, window), "scale": scale, "dropout_p": dropout_p}


_INPUTS = (0, 1, 2, 4)  # q, k, v and bias
_PLAN = _node.Plan(
    "FusedAttentionBackward",
    _Attention,
    _context,
    backward="attention_backward_direct",
    sources="s0 s1 s2 s3 s4 c0 c1 s8 s9 s10 c2 c3 s5 g0 s6 s7",
    inputs=_INPUTS,
)
_WITH_BIAS = _node.Plan("FusedAttentionBackward", _Attention, _context, backward=None, inputs=_INPUTS)


def directly(q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed, wants_lse):
    """out of a direct call, or (out, lse); None where it is not for one."""
    keeping = _node.KEEP
    inputs = (q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p)
    both = direct_call(*inputs, seed, wants_lse, keeping)
    lacking = both is True  # the seed, if no node is made by Python
    if lacking:
        seed = seed_for(q, dropout_p, seed)
        both = None if keeping is False else direct_call(*inputs, seed, wants_lse, keeping)
    if not lacking and type(both) is not list:
        return both
    scale, dropout_p = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale), float(dropout_p)
    if type(both) is list:
        out, lse = both
        # the masks too, so that changing one in place before backward is an error
        saved = (q, k, v, to_save(keep), bias, seed, out, lse, *map(to_save, (k_lengths, q_offsets, k_offsets)))
        plan = _PLAN if bias is None or not bias.requires_grad else _WITH_BIAS
        plan.attach((out,), (q, k, v, bias), saved, (causal, window, scale, dropout_p))
    else:
        others = Others(causal, window, k_lengths, q_offsets, k_offsets)
        out, lse = _apply_directly(q, k, v, keep, bias, seed, others, None, scale, dropout_p)
    return (out, lse) if wants_lse else out


def _mask(q: Tensor, k: Tensor, keep: Tensor | None, bias: Tensor | None, others: Others) -> Mask:
    return make_mask(q, k, keep=keep, bias=bias, **others._asdict())
