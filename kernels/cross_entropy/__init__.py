"""Cross entropy with label smoothing: the losses of rows of logits, and their gradient without stored probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels._autograd import once_differentiable
from fused_transformer.kernels._checks import dense_last, require
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.cross_entropy import compiled, direct
from fused_transformer.kernels.cross_entropy.checks import check_range, check_reduction, check_tensors, checked_options

__all__ = ["cross_entropy", "has_kernel", "op"]

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))
_direct_call = direct.forward


class _CrossEntropy(torch.autograd.Function):
    """The losses of the rows; shared by all backends. What is saved of a row is its maximum and log Σ exp(x - maximum):
    the sum of the two, their lse, would lose in float32 what the maximum is large by. The reference saves neither.
    """

    @staticmethod
    def forward(ctx, logits, targets, target_weight, every_weight, z_loss, ignore_index, inplace):
        rest = (target_weight, every_weight, z_loss, ignore_index)
        backend = op.pick(logits, targets, *rest)
        losses, top, log_sum = backend.forward(logits, targets, *rest)
        ctx.save_for_backward(logits, targets, top, log_sum)
        ctx.backend, ctx.rest, ctx.inplace = backend, rest, inplace
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        logits, targets, top, log_sum = ctx.saved_tensors
        dlogits = ctx.backend.backward(dlosses, logits.detach(), targets, top, log_sum, *ctx.rest, ctx.inplace)
        if ctx.inplace:
            direct.overwritten(logits)
        return dlogits, None, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    """Cross entropy between a smoothed target q and softmax(logits).

        loss_i = -Σ_v q_i(v) · log softmax(logits_i)_v  +  z_loss · lse_i²          lse = log Σ_v exp(logits_v)

        smoothing      q(target)        q(v), any other v
        "uniform"      1 - ε + ε/V      ε/V                 torch.nn.functional.cross_entropy
        "others"       1 - ε            ε/(V - 1)           tensor2tensor, fairseq

    tensor2tensor also subtracts the entropy of q, a constant without gradient; it is not subtracted here.

    Args:
        logits: (..., V), V >= 1. float32, float16, bfloat16 or float64 (reference only); any strides (a last axis that
            is not contiguous is copied). -inf is a word that can't be: probability 0, and gradient 0 without smoothing;
            smoothing gives it weight, so that the loss is inf, as torch's.
        targets: (...), int32 or int64, on the device of logits.
        label_smoothing: ε, from 0 to 1; with "others" at most 1 - 1/V, where the target has no more than its share.
        z_loss: weight of lse², which keeps logits near 0; at least 0.
        ignore_index: rows with this target have loss 0 and gradient 0, whatever their logits (NaN too).
        reduction: "mean" over the rows that are not ignored (NaN if there is none, as torch), "sum" or "none".
        inplace_backward: the gradient is written into the memory of logits, which saves as much memory again. After
            the backward pass logits hold their gradient: do not read them. A second backward pass through anything
            that saved them is an error. Under torch.compile and torch.func the gradient has memory of its own.

    Returns:
        (), or targets' shape for "none"; float32 (float64 for float64), also for 16-bit logits, unlike torch.

    Raises:
        IndexError: a target on the CPU is outside the vocabulary: the sentence says which, and where. On a GPU, where
            looking would wait for it, such a row's loss and gradient are NaN; nothing is read out of bounds.
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32 relative to the row's maximum; error at most twice that of plain torch in float32.
        A row's loss does not depend on the other rows.
    Backward: dlogits, one read and one write of the logits; the same bits on every run. Once differentiable.
    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; Vaswani et al. 2017, section 5.4; z-loss: Chowdhery et al.
        2022, arXiv:2204.02311, section 5.
    """
    check_reduction(reduction)
    if not torch.compiler.is_compiling():
        # on CUDA the sum over rows is torch's own
        directly = "none" if isinstance(logits, Tensor) and logits.is_cuda else reduction
        options = (label_smoothing, smoothing, z_loss, ignore_index)
        losses = _direct_call(logits, targets, *options, directly, False)
        if losses is True:
            refused = inplace_backward and logits.is_leaf  # the long way says why
            given = (logits, targets, options, directly, inplace_backward)
            losses = None if refused else direct.differentiated(*given)
        if losses is not None and directly == reduction:
            return losses
    else:
        losses = None
    if losses is None and routed(logits):
        options = (float(label_smoothing), smoothing, float(z_loss), int(ignore_index))
        losses = compiled.losses_and_statistics(logits, targets, *options)[0]
    elif losses is None:
        losses = _losses(logits, targets, label_smoothing, smoothing, z_loss, ignore_index, inplace_backward)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def _losses(logits, targets, label_smoothing, smoothing, z_loss, ignore_index, inplace_backward) -> Tensor:
    """The losses of all rows, in targets' shape."""
    check_tensors(logits, targets)
    vocabulary = logits.shape[-1]
    rest = checked_options(vocabulary, label_smoothing, smoothing, z_loss, ignore_index)
    check_range(targets, vocabulary, ignore_index)
    rows = dense_last(logits).reshape(-1, vocabulary)
    arguments = (rows, targets.reshape(-1), *rest)
    wants_backward = torch.is_grad_enabled() and logits.requires_grad
    if wants_backward and inplace_backward:
        require(not logits.is_leaf, "inplace_backward would overwrite logits that no operation made")
        overlap = len(rows) > 1 and rows.stride(0) < vocabulary
        require(not overlap, "inplace_backward needs logits whose rows do not share memory")
    if wants_backward or forward_ad._current_level >= 0:  # forward-mode AD: autograd must see the call to refuse it
        losses = _CrossEntropy.apply(*arguments, inplace_backward)
    else:
        losses = op.pick(*arguments).forward(*arguments)[0]
    return losses.view(targets.shape)


def has_kernel(logits: Tensor) -> bool:
    """Whether a kernel takes logits here, as opposed to the reference, which costs what F.cross_entropy does."""
    return not torch.compiler.is_compiling() and op.serves(logits, None, 1.0, 0.0, 0.0, -100)
