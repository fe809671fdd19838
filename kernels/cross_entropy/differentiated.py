"""Cross entropy as autograd sees it: one Function for direct calls (csrc/cross_entropy/bind_direct.cpp) and for all
backends.

Both ways save the same tensors, in the shapes of the call: a checkpoint's second forward pass may go the other way, if
only because the first call of a process on a GPU never is direct.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.cross_entropy.checks import checked_options

direct_call = _direct.call("cross_entropy_direct")
_direct_backward = _direct.call("cross_entropy_backward_direct")


class Options(NamedTuple):
    """What the caller said of the loss, but for the reduction."""

    label_smoothing: float
    smoothing: str
    z_loss: float
    ignore_index: int


class _CrossEntropy(torch.autograd.Function):
    """What is saved of a row is its maximum and log Σ exp(x - maximum): the sum of the two, their lse, would lose in
    float32 what the maximum is large by. The reference saves neither.
    """

    @staticmethod
    def forward(ctx, logits, targets, options: Options, reduction: str, inplace: bool, is_direct: bool):
        kept = direct_call(logits, targets, *options, reduction, True) if is_direct else None
        backend = None
        if kept is None:
            backend, loss, *statistics, counted = losses(logits, targets, options, reduction)
        else:
            loss, *statistics, counted = kept
        ctx.save_for_backward(logits, targets, *statistics)
        ctx.backend, ctx.options, ctx.reduction, ctx.inplace = backend, options, reduction, inplace
        ctx.counted = counted
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, *statistics = ctx.saved_tensors
        backend, dlogits = ctx.backend, None
        if backend is None:
            into = logits.detach() if ctx.inplace else None
            kept = (logits, targets, *statistics, *ctx.options, ctx.reduction, ctx.counted, into)
            dlogits = _direct_backward(dloss, *kept)
        if dlogits is None:
            backend = backend or OPS["cross_entropy"].on(logits)
            dlosses = dloss / ctx.counted if ctx.reduction == "mean" else dloss
            dlosses = dlosses.expand(targets.shape).reshape(-1)
            rows, flat, *weights = _operands(logits.detach(), targets, ctx.options)
            dlogits = backend.backward(dlosses, rows, flat, *statistics, *weights, ctx.inplace).view(logits.shape)
        if ctx.inplace:  # whoever else saved the logits for a backward pass now gets an error, not the gradient
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None, None, None


apply = _CrossEntropy.apply
_apply_directly = applied_directly(_CrossEntropy)


def _context(_saved: tuple, constants: tuple) -> dict:
    *options, reduction, counted, _into = constants
    return {"backend": None, "options": Options(*options), "reduction": reduction, "counted": counted, "inplace": False}


_PLAN = _node.Plan(
    "FusedCrossEntropyBackward",
    _CrossEntropy,
    _context,
    backward="cross_entropy_backward_direct",
    sources="g0 s0 s1 s2 s3 c0 c1 c2 c3 c4 c5 c6",
    inputs=(0,),
)


def directly(logits, targets, options: Options, reduction: str, inplace: bool) -> Tensor | None:
    """The loss of a direct call; None where it is not for one."""
    keep = False if inplace else _node.KEEP
    loss = direct_call(logits, targets, *options, reduction, keep)
    if type(loss) is list:
        loss, top, log_sum, counted = loss
        _PLAN.attach((loss,), (logits,), (logits, targets, top, log_sum), (*options, reduction, counted, None))
    elif loss is True:  # a gradient is wanted
        # of logits that no operation made the long way says why they can't be overwritten
        refused = inplace and logits.is_leaf
        loss = None if refused else _apply_directly(logits, targets, options, reduction, inplace, True)
    return loss


def losses(logits: Tensor, targets: Tensor, options: Options, reduction: str) -> tuple:
    """(backend, loss, top, log_sum, by what a mean was divided) of the backend that is chosen."""
    operands = _operands(logits, targets, options)
    backend = OPS["cross_entropy"].pick(*operands)
    each, top, log_sum = backend.forward(*operands)
    each = each.view(targets.shape).detach()  # for autograd no view, which nobody could write to
    counted = 0 if reduction == "none" else int((targets != options.ignore_index).sum())
    return backend, reduced(each, reduction, counted), top, log_sum, counted


def reduced(each: Tensor, reduction: str, counted: int | Tensor) -> Tensor:
    """The loss of all rows."""
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / counted


def _operands(logits: Tensor, targets: Tensor, options: Options) -> tuple:
    """What a backend takes: rows, their targets, and the weights of `checked_options`."""
    rows = dense_last(logits).reshape(-1, logits.shape[-1])
    return rows, targets.reshape(-1), *checked_options(logits.shape[-1], *options)
