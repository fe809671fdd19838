"""Layer norm as operators of torch; see kernels/_compile.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._autocast import widened
from fused_transformer.kernels._checks import require_dropout
from fused_transformer.kernels._compile import absent, operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.layer_norm import reference
from fused_transformer.kernels.layer_norm.checks import Wanted, check_eps, check_tensors


def layer_norm(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total):
    """`_run` as one node."""
    x, residual, x_bias, weight, bias = widened(x, residual, x_bias, weight, bias)
    if residual is not None and residual.dtype != x.dtype:
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    seed = seed_for(x, dropout_p, seed)
    tensors = (x, residual, x_bias, weight, bias)
    # torch.jit.trace checks a trace by another one without gradients, whose nodes must be the same
    with_gradients = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    wants_backward = with_gradients and any(t is not None and t.requires_grad for t in tensors)
    y, total, _, _ = _layer_norm(*tensors, seed, eps, dropout_p, rms, wants_total, wants_backward)
    return (y, total) if wants_total else y


def _makes_total(residual, x_bias, seed) -> bool:
    """Whether the sum is another tensor than x."""
    return residual is not None or x_bias is not None or seed is not None


# ---------------------------------------------------------------- y, total and the statistics


def _forward(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total, wants_backward):
    _check(x, residual, x_bias, weight, bias, seed, eps, dropout_p)
    keep_total = wants_total or wants_backward
    arguments = (x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, keep_total, wants_backward)
    outputs = OPS["layer_norm"].pick(*arguments).forward(*arguments)
    return tuple(absent(x) if output is None else output for output in outputs)


def _forward_fake(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total, wants_backward):
    _check(x, residual, x_bias, weight, bias, seed, eps, dropout_p)
    has_total = (wants_total or wants_backward) and _makes_total(residual, x_bias, seed)
    total = x.new_empty(x.shape) if has_total else absent(x)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[:-1], dtype=statistics) if wants_backward and not rms else absent(x)
    rstd = x.new_empty(x.shape[:-1], dtype=statistics) if wants_backward else absent(x)
    return x.new_empty(x.shape), total, mean, rstd


def _forward_plain(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total, wants_backward):
    _check(x, residual, x_bias, weight, bias, seed, eps, dropout_p)
    arguments = (x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, wants_total, wants_backward)
    return reference.forward(*arguments)


def _check(x, residual, x_bias, weight, bias, seed, eps, dropout_p):
    check_tensors(x, residual, x_bias, weight, bias)
    check_eps(eps)
    require_dropout(dropout_p, seed, x.device)


def _save(ctx, inputs, output):
    x, residual, x_bias, weight, bias, seed, _, dropout_p, rms, wants_total, wants_backward = inputs
    _, total, mean, rstd = output
    saved_total = total if _makes_total(residual, x_bias, seed) else x
    ctx.save_for_backward(saved_total, weight, None if rms else mean, rstd, seed)
    ctx.dropout_p, ctx.rms, ctx.has_statistics = dropout_p, rms, wants_backward
    ctx.param_dtypes = [None if p is None else p.dtype for p in (x_bias, weight, bias)]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *(() if wants_total else (total,)))


def _gradients(ctx, dy, dtotal, _dmean, _drstd):
    if not ctx.has_statistics:
        raise RuntimeError("this node was made without wants_backward=True, and kept nothing for a gradient")
    total, weight, mean, rstd, seed = ctx.saved_tensors
    dx, dresidual, dx_bias, dweight, dbias = ctx.needs_input_grad[:5]
    wanted = Wanted(dx, dresidual, dx_bias, dweight and dy is not None, dbias and dy is not None)
    given = [dtype for dtype in ctx.param_dtypes if dtype is not None]
    param_dtype = torch.float32 if torch.float32 in given else total.dtype
    arguments = (dy, dtotal, total, weight, mean, rstd, seed, ctx.dropout_p, ctx.rms, param_dtype)
    gradients = _call_backward(*arguments, list(wanted))
    dx, dresidual, *sums = (x if want else None for x, want in zip(gradients, wanted, strict=True))
    if wanted.dresidual and _is_one(wanted, seed):
        dresidual = dx
    sums = (s if s is None else s.to(dtype) for s, dtype in zip(sums, ctx.param_dtypes, strict=True))
    return dx, dresidual, *sums, None, None, None, None, None, None


# ---------------------------------------------------------------- their gradient


def _is_one(wanted: Wanted, seed: Tensor | None) -> bool:
    """Whether dx and dresidual are one tensor, as where nothing was dropped: then the operator returns dx alone."""
    return wanted.dx and wanted.dresidual and seed is None


def _backward(dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted):
    wanted = Wanted(*wanted)
    backend = OPS["layer_norm"].pick(total)
    arguments = (dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted)
    dx, dresidual, *sums = backend.backward(*arguments)
    if _is_one(wanted, seed):
        dresidual = None
    outputs = [None if x is None else x.contiguous() for x in (dx, dresidual, *sums)]
    return tuple(absent(total) if x is None else x for x in outputs)


def _backward_fake(dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted):
    wanted = Wanted(*wanted)
    returns_dresidual = wanted.dresidual and not _is_one(wanted, seed)
    rows = (total.new_empty(total.shape) if want else absent(total) for want in (wanted.dx, returns_dresidual))
    cols = total.shape[-1:]
    sums = (total.new_empty(cols, dtype=param_dtype) if want else absent(total) for want in wanted[2:])
    return *rows, *sums


_call_backward = operator(
    "layer_norm_backward(Tensor? dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor? mean, Tensor rstd, "
    "Tensor? seed, float dropout_p, bool rms, ScalarType param_dtype, bool[] wanted) "
    "-> (Tensor dx, Tensor dresidual, Tensor dx_bias, Tensor dweight, Tensor dbias)",
    run=_backward,
    fake=_backward_fake,
)
_layer_norm = operator(
    "layer_norm(Tensor x, Tensor? residual, Tensor? x_bias, Tensor? weight, Tensor? bias, Tensor? seed, float eps, "
    "float dropout_p, bool rms, bool wants_total, bool wants_backward) "
    "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    run=_forward,
    fake=_forward_fake,
    plain=_forward_plain,
    save=_save,
    backward=_gradients,
)
