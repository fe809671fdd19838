"""Cross entropy with label smoothing: the losses of rows of logits, and their gradient without stored probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels._checks import dense_last, require
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.cross_entropy import compiled, differentiated
from fused_transformer.kernels.cross_entropy.checks import check_range, check_reduction, check_tensors, checked_options
from fused_transformer.kernels.cross_entropy.differentiated import Options, reduced

__all__ = ["cross_entropy", "has_kernel", "op"]

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))


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
    # on a GPU, and where a call is an operator of torch, the sum over rows is torch's own
    part = reduction if isinstance(logits, Tensor) and logits.is_cpu else "none"
    options = Options(label_smoothing, smoothing, z_loss, ignore_index)
    loss = None
    if not torch.compiler.is_compiling():
        loss = differentiated.directly(logits, targets, options, part, inplace_backward)
        if loss is not None and part == reduction:
            return loss
    if loss is None and routed(logits):
        part = "none"
        numbers = Options(float(label_smoothing), smoothing, float(z_loss), int(ignore_index))
        loss = compiled.losses_and_statistics(logits, targets, *numbers)[0]
    elif loss is None:
        loss = _the_long_way(logits, targets, options, part, inplace_backward)
    if part == reduction:
        return loss
    return reduced(loss, reduction, (targets != ignore_index).sum() if reduction == "mean" else 0)


def _the_long_way(logits, targets, options: Options, reduction: str, inplace: bool) -> Tensor:
    check_tensors(logits, targets)
    vocabulary = logits.shape[-1]
    checked_options(vocabulary, *options)
    check_range(targets, vocabulary, options.ignore_index)
    wants_backward = torch.is_grad_enabled() and logits.requires_grad
    if wants_backward and inplace:
        require(not logits.is_leaf, "inplace_backward would overwrite logits that no operation made")
        rows = dense_last(logits.detach()).reshape(-1, vocabulary)
        overlap = len(rows) > 1 and rows.stride(0) < vocabulary
        require(not overlap, "inplace_backward needs logits whose rows do not share memory")
    if wants_backward or forward_ad._current_level >= 0:  # forward-mode AD: autograd must see the call to refuse it
        return differentiated.apply(logits, targets, options, reduction, inplace, False)
    return differentiated.losses(logits, targets, options, reduction)[1]


def has_kernel(logits: Tensor) -> bool:
    """Whether a kernel takes logits here, as opposed to the reference, which costs what F.cross_entropy does."""
    return not torch.compiler.is_compiling() and op.serves(logits, None, 1.0, 0.0, 0.0, -100)
