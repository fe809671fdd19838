"""Cross entropy as operators of torch; see kernels/_compile.py. They give the rows' losses; reductions are torch's.

Targets on a CPU are looked at when the node runs. Which backend runs the gradient is decided when that runs, so that
here each row's maximum and log Σ exp(x - maximum) are always there for it.
"""

from __future__ import annotations

import torch

from fused_transformer.kernels._checks import dense_last
from fused_transformer.kernels._compile import operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.cross_entropy import reference
from fused_transformer.kernels.cross_entropy.checks import check_range, check_tensors, checked_options


def _forward(logits, targets, *options):
    rest = _checked(logits, targets, *options)
    check_range(targets, logits.shape[-1], rest[-1])
    rows, flat = _rows(logits), targets.reshape(-1)
    losses, top, log_sum = OPS["cross_entropy"].pick(rows, flat, *rest).forward(rows, flat, *rest)
    if top is None:
        top = rows.amax(-1).to(losses.dtype)
        log_sum = torch.logsumexp(rows.to(losses.dtype) - top[:, None], -1)
    return tuple(x.reshape(targets.shape) for x in (losses, top, log_sum))


def _forward_fake(logits, targets, *options):
    _checked(logits, targets, *options)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(3))


def _forward_plain(logits, targets, *options):
    rest = _checked(logits, targets, *options)
    losses, *statistics = reference.forward(_rows(logits), targets.reshape(-1), *rest)
    return losses.reshape(targets.shape), *statistics


def _save(ctx, inputs, output):
    logits, targets, *ctx.options = inputs
    _, top, log_sum = output
    ctx.save_for_backward(logits, targets, top, log_sum)
    ctx.mark_non_differentiable(top, log_sum)


def _gradients(ctx, dlosses, _dtop, _dlog_sum):
    return _call_backward(dlosses, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _backward(dlosses, logits, targets, top, log_sum, *options):
    rest = _checked(logits, targets, *options)
    rows, dlosses, targets, top, log_sum = (
        _rows(logits),
        *(x.reshape(-1) for x in (dlosses, targets, top, log_sum)),
    )
    backend = OPS["cross_entropy"].pick(rows, targets, *rest)
    return backend.backward(dlosses, rows, targets, top, log_sum, *rest, False).view(logits.shape)


def _backward_fake(dlosses, logits, *_):
    return logits.new_empty(logits.shape)


def _checked(logits, targets, *options):
    check_tensors(logits, targets)
    return checked_options(logits.shape[-1], *options)


def _rows(logits):
    return dense_last(logits).reshape(-1, logits.shape[-1])


_OPTIONS = "float label_smoothing, str smoothing, float z_loss, int ignore_index"
_call_backward = operator(
    "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor targets, Tensor top, Tensor log_sum, "
    f"{_OPTIONS}) -> Tensor",
    run=_backward,
    fake=_backward_fake,
)
losses_and_statistics = operator(
    f"cross_entropy(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor losses, Tensor top, Tensor log_sum)",
    run=_forward,
    fake=_forward_fake,
    plain=_forward_plain,
    save=_save,
    backward=_gradients,
)
