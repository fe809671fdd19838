"""bias_act as operators of torch; see kernels/_compile.py."""

from __future__ import annotations

import torch

from fused_transformer.kernels._checks import require_dropout
from fused_transformer.kernels._compile import absent, operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.bias_act import reference
from fused_transformer.kernels.bias_act.checks import check


def bias_act(x, bias, seed, activation, dropout_p):
    """`bias_act` as one node."""
    seed = seed_for(x, dropout_p, seed)
    return _bias_act(x, bias, seed, activation, dropout_p)


def _check(x, bias, seed, activation, dropout_p):
    check(x, bias, activation)
    require_dropout(dropout_p, seed, x.device)


def _forward(*arguments):
    _check(*arguments)
    return OPS["bias_act"].pick(*arguments).forward(*arguments)


def _forward_fake(x, *rest):
    _check(x, *rest)
    return x.new_empty(x.shape)


def _forward_plain(*arguments):
    _check(*arguments)
    return reference.forward(*arguments)


def _save(ctx, inputs, output):
    x, bias, seed, ctx.activation, ctx.dropout_p = inputs
    ctx.save_for_backward(*((output, None, None) if ctx.activation == "relu" else (x, bias, seed)))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, dy):
    wanted = ctx.needs_input_grad[:2]
    dx, dbias = _call_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.dropout_p, *wanted)
    return dx if wanted[0] else None, dbias.to(ctx.bias_dtype) if wanted[1] else None, None, None, None


def _backward(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias):
    backend = OPS["bias_act"].pick(saved, bias, seed, activation, dropout_p)
    dx, dbias = backend.backward(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias)
    return absent(saved) if dx is None else dx.contiguous(), absent(saved) if dbias is None else dbias


def _backward_fake(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias):
    dx = saved.new_empty(saved.shape) if wants_dx else absent(saved)
    sums = torch.promote_types(saved.dtype, torch.float32)
    return dx, saved.new_empty(saved.shape[-1:], dtype=sums) if wants_dbias else absent(saved)


_call_backward = operator(
    "bias_act_backward(Tensor dy, Tensor saved, Tensor? bias, Tensor? seed, str activation, float dropout_p, "
    "bool wants_dx, bool wants_dbias) -> (Tensor dx, Tensor dbias)",
    run=_backward,
    fake=_backward_fake,
)
_bias_act = operator(
    "bias_act(Tensor x, Tensor? bias, Tensor? seed, str activation, float dropout_p) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    plain=_forward_plain,
    save=_save,
    backward=_gradients,
)
