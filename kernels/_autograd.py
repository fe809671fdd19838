"""What the ops' autograd.Functions have in common: a second derivative is an error and never a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def applied_directly(function: type[torch.autograd.Function]) -> Callable:
    """function.apply without what torch does ahead of it for torch.func's sake, a third of its time.

    For a call of which a direct call has said that a gradient is wanted: then no transform of torch.func is at work.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _NotDifferentiable(torch.autograd.Function):
    """Gradients as they are, on a node between them and what they depend on, where a second derivative ends."""

    @staticmethod
    def forward(_ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(_ctx, *_gradients):
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


class _Unpacked:
    """A Function's ctx whose saved tensors have been unpacked, which happens once (checkpointing sees to that)."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


_NOT_TRACED: dict[Callable, Callable] = {}


def _not_traced(backward: Callable) -> Callable:
    """`backward` for compiled autograd, to be called and not looked into.

    Dynamo would cut it at the call of a kernel, and drop the tensors of which only the addresses are used behind the
    cut: the kernel would write into memory that is free.
    """
    if backward not in _NOT_TRACED:
        _NOT_TRACED[backward] = torch._dynamo.disable(backward)
    return _NOT_TRACED[backward]


def once_differentiable(backward: Callable) -> Callable:
    """What torch's decorator of that name does, for whoever asks for a second derivative.

    torch's alone lets two of them through, as if the gradient did not depend on what was saved: with create_graph=True
    a penalty on the gradient of a loss, whose upstream gradient is a constant, would be left out in silence; and
    torch.autograd.grad of a gradient with respect to an input would find that it was not used.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.compiler.is_dynamo_compiling():
            return _not_traced(backward)(ctx, *gradients)
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        ctx = _Unpacked(ctx)  # create_graph=True
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [x for x in outputs if x is not None]
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        if not (given and causes):
            return outputs
        ends = iter(_NotDifferentiable.apply(len(given), *given, *causes))
        return tuple(None if x is None else next(ends) for x in outputs)

    return checked
