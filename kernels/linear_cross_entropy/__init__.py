"""Cross entropy of a linear layer's outputs, which are never all there at once: the end of a language model."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels import _direct, matmul
from fused_transformer.kernels._autograd import once_differentiable
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.cross_entropy import check_range, check_reduction, checked_options
from fused_transformer.kernels.linear_cross_entropy import compiled
from fused_transformer.kernels.linear_cross_entropy.checks import checked_tensors, lowered_dtype

__all__ = ["has_kernel", "linear_cross_entropy", "op"]

CHUNK_ROWS = 128  # tokens whose logits are one chunk, whatever the vocabulary

op = Op(__name__, order=("cpu", "reference"))
_direct_is_ready, _direct_losses = _direct.call("direct_is_ready"), _direct.call("cross_entropy_direct")


class _Total(torch.autograd.Function):
    """The sum or mean of the losses. One number is missing before the gradients can be computed, the upstream gradient
    that all rows share, and they are scaled by it at the end. So the forward pass computes them, chunk by chunk, while
    it has the logits; what is saved is as large as the parameters. (To compute the logits again would be a third more
    products.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, rest, mean):
        arguments = (hidden, weight, bias, targets, dtype, *rest)
        count = (targets != rest[-1]).sum() if mean else 1
        upstream = hidden.new_ones((), dtype=torch.promote_types(hidden.dtype, torch.float32)) / count
        with _without_autocast(hidden):
            losses, *gradients = op.pick(*arguments).backward(
                upstream.expand(len(hidden)), *arguments, ctx.needs_input_grad[:3]
            )
        ctx.save_for_backward(hidden, weight, bias, *gradients)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        inputs, gradients = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        scaled = (
            None if g is None else torch.mul(g, dtotal, out=x.new_empty(g.shape))
            for x, g in zip(inputs, gradients, strict=True)
        )
        return *scaled, None, None, None, None


class _Losses(torch.autograd.Function):
    """The losses of the rows. Each has its own upstream gradient, which the backward pass alone knows: it computes the
    logits again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, rest):
        arguments = (hidden, weight, bias, targets, dtype, *rest)
        ctx.backend, ctx.rest = op.pick(*arguments), (dtype, *rest)
        ctx.save_for_backward(hidden, weight, bias, targets)
        with _without_autocast(hidden):
            return ctx.backend.forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        inputs = ctx.saved_tensors
        with _without_autocast(dlosses):
            _, *gradients = ctx.backend.backward(dlosses, *inputs, *ctx.rest, ctx.needs_input_grad[:3])
        given = (None if g is None else g.to(x.dtype) for x, g in zip(inputs[:3], gradients, strict=True))
        return *given, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    smoothing: str = "uniform",
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(hidden weightᵀ + bias, targets)`, without ever holding the (tokens, V) logits.

        logits = hidden weightᵀ + bias
        loss_i = -Σ_v q_i(v) · log softmax(logits_i)_v  +  z_loss · lse_i²          lse = log Σ_v exp(logits_v)

    q and the options are `cross_entropy`'s. On the CPU tokens are taken in chunks, whose logits take up about as much
    memory as the weight's gradient (without gradients: 16 MB), and each chunk's gradients are taken from them at once.

    Args:
        hidden: (..., E). float32, float16, bfloat16 or float64 (reference only); any strides.
        weight: (V, E), V >= 1, the dtype of hidden.
        bias: (V,), the dtype of hidden, or None.
        targets: (...), int32 or int64, on the device of hidden.
        label_smoothing, smoothing, z_loss, ignore_index: as `cross_entropy` has them.
        reduction: "mean" over the tokens that are not ignored (NaN if there is none), "sum" or "none". For the first
            two the gradients are computed by the forward pass, where any is required; for "none", for float16, whose
            loss scale must come first, and under torch.compile and torch.func the backward pass computes the logits
            a second time.

    Returns:
        (), or targets' shape for "none"; float32 (float64 for float64).

    Under torch.autocast the products are taken in its dtype, as those of torch.nn.functional.linear, and hidden, weight
    and bias may be of different dtypes.

    Raises:
        IndexError: a target on the CPU is outside the vocabulary: the sentence says which, and where.
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: products by torch; logits and their gradient are rounded to the products' dtype, and the sums over chunks
        (dweight, dbias) are float32. Error at most twice that of plain torch in the same dtype. NaN in an ignored row
        of hidden reaches dweight, as it does through a linear layer.
    Backward: dhidden, dweight, dbias; the same bits on every run. Once differentiable.
    Source: as `cross_entropy`; the chunks are those of Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.
    """
    if not torch.compiler.is_compiling():
        logits = _logits_of_few(hidden, weight, bias)
        if logits is not None:
            loss = _direct_losses(logits, targets, label_smoothing, smoothing, z_loss, ignore_index, reduction, False)
            if loss is not None:
                return loss
    check_reduction(reduction)
    options = (label_smoothing, smoothing, z_loss, ignore_index)
    if routed(hidden):
        options = (float(label_smoothing), smoothing, float(z_loss), int(ignore_index))
        losses = compiled.losses(hidden, weight, bias, targets, lowered_dtype(hidden), *options)
        return _reduced(losses, targets, ignore_index, reduction)
    arguments = checked_tensors(hidden, weight, bias, targets)
    rest = checked_options(len(weight), *options)
    check_range(targets, len(weight), ignore_index)
    wants_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if wants_backward and reduction != "none" and arguments[-1] != torch.float16:
        return _Total.apply(*arguments, rest, reduction == "mean")
    if wants_backward or forward_ad._current_level >= 0:  # forward-mode AD: autograd must see the call to refuse it
        losses = _Losses.apply(*arguments, rest)
    else:
        arguments += rest
        with _without_autocast(hidden):
            losses = op.pick(*arguments).forward(*arguments)
    return _reduced(losses.view(targets.shape), targets, ignore_index, reduction)


def _logits_of_few(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The logits where they are one chunk anyway and nobody differentiates: the fewer steps, the quicker. Else None.

    What does not fit is left to those who say what is wrong with it.
    """
    if type(hidden) is not Tensor or not hidden.is_cpu or hidden.dtype != torch.float32 or hidden.dim() < 1:
        return None
    width = hidden.shape[-1]
    few = 0 < hidden.numel() <= CHUNK_ROWS * width
    if not few or not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width:
        return None
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not all(isinstance(x, Tensor) and x.is_cpu and x.dtype == torch.float32 for x in tensors):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or not _direct_is_ready():
        return None
    return (matmul.linear if matmul.takes(hidden, weight, bias) else F.linear)(hidden, weight, bias)


def has_kernel(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a kernel takes these here, as opposed to the reference, which holds all the logits."""
    return not torch.compiler.is_compiling() and op.serves(hidden, weight, None, None, hidden.dtype)


def _reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """The products' dtype has been chosen; what autocast would make of them inside is not wanted."""
    return torch.autocast(x.device.type, enabled=False)
