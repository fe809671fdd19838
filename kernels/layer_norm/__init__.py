"""Layer norm and RMS norm, alone or fused with the residual sum, bias and dropout that come before them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._autocast import widened
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import require_dropout
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.layer_norm import compiled
from fused_transformer.kernels.layer_norm.checks import Wanted, check_eps, check_tensors

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))
_direct_call = _direct.call("layer_norm_direct")
_direct_backward = _direct.call("layer_norm_backward_direct")


class _LayerNorm(torch.autograd.Function):
    """Shared by all backends: they save the same tensors."""

    @staticmethod
    def forward(ctx, x, residual, x_bias, weight, bias, seed, options: tuple):
        eps, dropout_p, rms, wants_total, wants_backward = options
        arguments: tuple = (x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms)
        kept = _direct_call(*arguments, wants_total, True) if wants_backward else None
        backend = None
        if kept is None:
            arguments += (wants_total or wants_backward, wants_backward)
            backend = op.pick(*arguments)
            kept = backend.forward(*arguments)
        y, total, mean, rstd = kept
        if wants_backward:
            # without a residual, x_bias and dropout the total is x, and no backend copies it
            ctx.save_for_backward(x if total is None else total, weight, mean, rstd, seed)
            ctx.backend, ctx.dropout_p, ctx.rms = backend, dropout_p, rms
            ctx.param_dtypes = [None if p is None else p.dtype for p in (x_bias, weight, bias)]
            ctx.set_materialize_grads(False)
        # The total is an output in any case: so autograd knows what the saved one depends on.
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtotal=None):
        total, weight, mean, rstd, seed = ctx.saved_tensors
        given = (dy, dtotal, total, weight, mean, rstd, seed, ctx.dropout_p, ctx.rms)
        wide = torch.float32 in ctx.param_dtypes
        gradients = _direct_backward(*given, wide, ctx.needs_input_grad) if ctx.backend is None else None
        if gradients is None:
            dx, dresidual, dx_bias, dweight, dbias = ctx.needs_input_grad[:5]
            wanted = Wanted(dx, dresidual, dx_bias, dweight and dy is not None, dbias and dy is not None)
            backend = ctx.backend or op.on(total)
            dx, dresidual, *sums = backend.backward(*given, torch.float32 if wide else total.dtype, wanted)
            sums = [s if s is None else s.to(dtype) for s, dtype in zip(sums, ctx.param_dtypes, strict=True)]
            gradients = dx, dresidual, *sums
        return *gradients, None, None


_apply_directly = applied_directly(_LayerNorm)


def _context(saved: tuple, constants: tuple) -> dict:
    dropout_p, rms, wide = constants
    dtype = torch.float32 if wide else saved[0].dtype
    return {"backend": None, "dropout_p": dropout_p, "rms": rms, "param_dtypes": [dtype] * 3}


_PLAN = _node.Plan(
    "FusedLayerNormBackward",
    _LayerNorm,
    _context,
    backward="layer_norm_backward_direct",
    sources="g0 g1 s0 s1 s2 s3 s4 c0 c1 c2 n",
    inputs=(0, 1, 2, 3, 4),
)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of x to mean 0 and variance 1, then scale and shift it.

        y = (x - mean(x)) / √(var(x) + eps) · weight + bias          var is the biased variance

    Args:
        x: (..., N), N >= 1. float32, float16, bfloat16 or float64 (reference only); any strides (a last axis that
            is not contiguous is copied).
        weight: (N,), the dtype of x or float32; None: 1.
        bias: (N,), likewise; None: 0.
        eps: added to the variance, at least 0.

    Returns:
        (..., N), contiguous, the dtype and device of x. Under torch.autocast 16-bit inputs on a GPU are taken as
        float32, and the result is float32, as torch's norms do; on a CPU autocast changes nothing, as there.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32; the variance is summed around the mean, so that it holds where |mean| >> std;
        error at most twice that of plain torch in the same dtype. A row's result does not depend on the other rows.
    Backward: dx, dweight, dbias; the same bits on every run and for every number of threads. Once differentiable.
    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, eq. 3-4.
    """
    return _run(x, None, None, weight, bias, None, eps, 0.0, rms=False, wants_total=False)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Scale the last axis of x to mean square 1.

        y = x / √(mean(x²) + eps) · weight

    Arguments, result, errors and numerics as in `layer_norm`.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    return _run(x, None, None, weight, None, None, eps, 0.0, rms=True, wants_total=False)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What follows a sublayer in a post-norm Transformer, in one pass over memory.

        total = residual + dropout(x + x_bias)
        y     = (total - mean(total)) / √(var(total) + eps) · weight + bias          var is the biased variance

    Args:
        x: (..., N), N >= 1: the sublayer's output. float32, float16, bfloat16 or float64 (reference only); any strides.
        residual: x's shape. If its dtype is another, both are taken in the wider one, as x + residual would be.
        weight: (N,), the dtype of x or float32; None: 1.
        bias: (N,), likewise; None: 0.
        x_bias: (N,), likewise; None: 0: the bias of the sublayer's last projection, left to this op.
        eps: added to the variance, at least 0.
        dropout_p: probability of zeroing an element of x + x_bias; the others are scaled by 1 / (1 - p).
        seed: (1,) int64 on x's device; the mask is a function of it alone. Default: drawn from torch's generator.

    Returns:
        y: x's shape, dtype and device; contiguous. Without a gradient to come, total is never written to memory.
            Under torch.autocast as `layer_norm`: in a model whose embedding is float32 so is the stream of residuals.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32; the variance is summed around the mean, so that it holds where |mean| >> std;
        error at most twice that of plain torch in the same dtype. As in eager torch, total is rounded to its dtype
        before it is normalised.
    Backward: dx, dresidual, dweight, dbias, dx_bias; the mask is drawn again, not stored; the same bits on every run
        and for every number of threads. Once differentiable.
    Source: Vaswani et al. 2017, sections 3.1 and 5.4: LayerNorm(x + Dropout(Sublayer(x))).
    """
    return _run(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms=False, wants_total=False)


def add_layer_norm_with_total(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm`, and the sum itself: a pre-norm Transformer normalises the stream and goes on with it.

    Returns:
        y: as `add_layer_norm`.
        total: residual + dropout(x + x_bias), x's shape and dtype. Both are differentiable.
    """
    return _run(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms=False, wants_total=True)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`rms_norm` of residual + dropout(x + x_bias); arguments, errors and numerics as in `add_layer_norm`."""
    return _run(x, residual, x_bias, weight, None, seed, eps, dropout_p, rms=True, wants_total=False)


def add_rms_norm_with_total(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, and the sum itself, as in `add_layer_norm_with_total`."""
    return _run(x, residual, x_bias, weight, None, seed, eps, dropout_p, rms=True, wants_total=True)


def _run(x, residual, x_bias, weight, bias, seed, eps, dropout_p, *, rms: bool, wants_total: bool):
    if not torch.compiler.is_compiling():
        result = _directly(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total)
        if result is not None:
            return result
    if routed(x):
        return compiled.layer_norm(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total)
    if torch._C._is_any_autocast_enabled():
        before = (x, residual, x_bias, weight, bias)
        x, residual, x_bias, weight, bias = widened(*before)
        if any(a is not b for a, b in zip(before, (x, residual, x_bias, weight, bias), strict=True)):
            result = _directly(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total)
            if result is not None:
                return result
    x, residual = check_tensors(x, residual, x_bias, weight, bias)
    check_eps(eps)
    require_dropout(dropout_p, seed, x.device)
    seed = seed_for(x, dropout_p, seed)
    tensors = (x, residual, x_bias, weight, bias)
    wants_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = (float(eps), float(dropout_p), rms, wants_total, wants_backward)
    if wants_backward or forward_ad._current_level >= 0:  # forward-mode AD: autograd must see the call to refuse it
        y, total = _LayerNorm.apply(*tensors, seed, options)
        return (y, total) if wants_total else y
    arguments = (*tensors, seed, *options)
    y, total, _, _ = op.pick(*arguments).forward(*arguments)  # half the host time of apply()
    return (y, total) if wants_total else y


def _directly(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total):
    """The result of a direct call; None where it is not for one."""
    keep, tensors, rest = _node.KEEP, (x, residual, x_bias, weight, bias), (eps, dropout_p, rms, wants_total)
    result = _direct_call(*tensors, seed, *rest, keep)
    lacking = result is True  # the seed, if no node is made by Python
    if lacking:
        seed = seed_for(x, dropout_p, seed)
        result = None if keep is False else _direct_call(*tensors, seed, *rest, keep)
    if type(result) is list:
        y, total, mean, rstd = result
        parameter = weight if weight is not None else bias if bias is not None else x_bias  # all have one dtype
        wide = parameter is not None and parameter.dtype is torch.float32
        saved = (x if total is None else total, weight, mean, rstd, seed)
        _PLAN.attach((y, total), tensors, saved, (dropout_p, rms, wide))
    elif lacking:
        y, total = _apply_directly(*tensors, seed, (*rest, True))
    else:
        return result
    return (y, total) if wants_total else y
