"""Cross entropy as direct calls, also where a gradient is wanted (csrc/cross_entropy/bind_direct.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _direct
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.cross_entropy.checks import checked_options

forward = _direct.call("cross_entropy_direct")
_backward = _direct.call("cross_entropy_backward_direct")


def overwritten(logits: Tensor) -> None:
    """The gradient is in the logits' memory: whoever else saved them for a backward pass now gets an error."""
    torch.autograd.graph.increment_version(logits)


class _CrossEntropy(torch.autograd.Function):
    """A call of which `forward` said that a gradient is wanted. The reduction is part of it, and of the gradient.

    options: (label_smoothing, smoothing, z_loss, ignore_index).
    """

    @staticmethod
    def forward(ctx, logits, targets, options: tuple, reduction: str, inplace: bool):
        kept = forward(logits, targets, *options, reduction, True)
        loss, statistics, counted = _the_long_way(logits, targets, options, reduction) if kept is None else kept
        ctx.save_for_backward(logits, targets, statistics)
        ctx.options, ctx.reduction, ctx.counted, ctx.inplace = options, reduction, counted, inplace
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, targets, statistics = ctx.saved_tensors
        into = logits.detach() if ctx.inplace else None
        rest = (*ctx.options, ctx.reduction, ctx.counted, into)
        dlogits = _backward(dloss, logits, targets, statistics, *rest)
        if dlogits is None:
            dlosses = dloss / ctx.counted if ctx.reduction == "mean" else dloss
            dlosses = dlosses.expand(targets.shape).reshape(-1)
            arguments = (*_rows(logits.detach(), targets), *statistics, *_weights(logits, ctx.options), ctx.inplace)
            dlogits = OPS["cross_entropy"].on(logits).backward(dlosses, *arguments).view(logits.shape)
        if ctx.inplace:
            overwritten(logits)
        return dlogits, None, None, None, None


differentiated = applied_directly(_CrossEntropy)


def _the_long_way(logits: Tensor, targets: Tensor, options: tuple, reduction: str) -> tuple[Tensor, Tensor, int]:
    """Where something began to look on since `forward` was asked."""
    backend = OPS["cross_entropy"].on(logits)
    losses, top, log_sum = backend.forward(*_rows(logits, targets), *_weights(logits, options))
    statistics, counted = torch.stack((top, log_sum)), 0
    if reduction == "none":
        return losses.view(targets.shape), statistics, counted
    counted = int((targets != options[-1]).sum())
    total = losses.sum()
    return total if reduction == "sum" else total / counted, statistics, counted


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.view(-1, logits.shape[-1]), targets.view(-1)


def _weights(logits: Tensor, options: tuple) -> tuple:
    return checked_options(logits.shape[-1], *options)
