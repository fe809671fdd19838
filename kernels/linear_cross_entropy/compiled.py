"""linear_cross_entropy as operators of torch; see kernels/_compile.py. They give the rows' losses; reductions are
torch's, and the backward pass computes the logits again.
"""

from __future__ import annotations

import torch

from fused_transformer.kernels._compile import absent, operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.cross_entropy import check_range, checked_options
from fused_transformer.kernels.linear_cross_entropy import reference
from fused_transformer.kernels.linear_cross_entropy.checks import with_dtype


def _arguments(hidden, weight, bias, targets, lowered, *options):
    """What a backend takes, checked but for the range of targets."""
    return *with_dtype(hidden, weight, bias, targets, lowered), *checked_options(weight.shape[0], *options)


def _forward(hidden, weight, bias, targets, *rest):
    arguments = _arguments(hidden, weight, bias, targets, *rest)
    check_range(targets, len(weight), rest[-1])
    return OPS["linear_cross_entropy"].pick(*arguments).forward(*arguments).reshape(targets.shape)


def _forward_fake(hidden, weight, bias, targets, *rest):
    _arguments(hidden, weight, bias, targets, *rest)
    return hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _forward_plain(hidden, weight, bias, targets, *rest):
    return reference.forward(*_arguments(hidden, weight, bias, targets, *rest)).reshape(targets.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.lowered, label_smoothing, smoothing, z_loss, ignore_index = inputs
    ctx.options = (label_smoothing, smoothing, z_loss, ignore_index)
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dlosses):
    wanted = ctx.needs_input_grad[:3]
    gradients = _call_backward(dlosses, *ctx.saved_tensors, ctx.lowered, *ctx.options, *wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 6


def _backward(dlosses, hidden, weight, bias, targets, lowered, *rest):
    *options, wants_hidden, wants_weight, wants_bias = rest
    wanted = (wants_hidden, wants_weight, wants_bias)
    arguments = _arguments(hidden, weight, bias, targets, lowered, *options)
    backend = OPS["linear_cross_entropy"].pick(*arguments)
    _, *gradients = backend.backward(dlosses.reshape(-1), *arguments, wanted)
    return tuple(
        absent(hidden) if g is None else g.to(x.dtype).contiguous().view(x.shape)
        for x, g in zip((hidden, weight, bias), gradients, strict=True)
    )


def _backward_fake(_dlosses, hidden, weight, bias, _targets, _lowered, *rest):
    inputs = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(x.new_empty(x.shape) if want else absent(hidden) for x, want in inputs)


def _flops(hidden_shape, weight_shape, *_args, **_kwargs):
    tokens = 1
    for size in hidden_shape[:-1]:
        tokens *= size
    return 2 * tokens * weight_shape[0] * weight_shape[1]


_OPTIONS = "ScalarType? lowered, float label_smoothing, str smoothing, float z_loss, int ignore_index"
_call_backward = operator(
    "linear_cross_entropy_backward(Tensor dlosses, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    f"{_OPTIONS}, bool wants_hidden, bool wants_weight, bool wants_bias) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    run=_backward,
    fake=_backward_fake,
    flops=lambda _dlosses, *shapes, **_kwargs: 3 * _flops(*shapes),
)
losses = operator(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_OPTIONS}) -> Tensor",
    run=_forward,
    fake=_forward_fake,
    plain=_forward_plain,
    save=_save,
    backward=_gradients,
    flops=_flops,
)
