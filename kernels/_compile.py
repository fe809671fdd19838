"""The ops as operators of torch, for whoever must see a call before it runs: torch.compile, torch.export, torch.func.

An eager call goes to its kernel (_direct.py) or its backend and pays for none of this. One that something looks on at
is one node, torch.ops.fused_transformer.<name>: its schema, what it computes, what its outputs look like, and its
gradient stand in kernels/<op>/compiled.py. Which backend runs is decided inside the node, when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula  # brings triton along, as the first call of an op would

from fused_transformer.kernels._checks import PLAIN_TYPES

NAMESPACE = "fused_transformer"

_library = torch.library.Library(NAMESPACE, "DEF")


def routed(x: Tensor) -> bool:
    """Whether a call with x must be an operator of torch's dispatcher instead of a direct call of a backend.

    It must where torch.compile or torch.export traces it, inside torch.func's vmap and grad, under a mode that looks at
    every operator (fake tensors, make_fx, FlopCounterMode, selective checkpointing), under torch.jit.trace, and for
    tensors that have no memory of their own (meta tensors, subclasses).
    """
    if torch.compiler.is_compiling():
        return True
    if not isinstance(x, Tensor):
        return False  # the op says so in its own words
    return (
        type(x) not in PLAIN_TYPES
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or x.is_meta
        or torch._C._get_tracing_state() is not None
    )


def operator(
    schema: str,
    *,
    run: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
    flops: Callable | None = None,
    plain: Callable | None = None,
) -> Callable[..., Any]:
    """Defines torch.ops.fused_transformer.<name> and returns the function that calls it, with positional arguments.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor y, ...)". An output that there is not in every call is `absent` where
            there is none. No output may share memory with an input or another output.
        run: computes the outputs, of real tensors. Looks at numbers, chooses the backend, raises the caller's errors.
        fake: the outputs' shapes, dtypes and strides, of tensors without numbers.
        save: save(ctx, inputs, output), as torch.library.register_autograd's setup_context.
        backward: backward(ctx, *gradients of the outputs), the gradients of all inputs. It calls operators too. None:
            differentiating this operator is an error, as every op's gradient can be taken once.
        flops: the operations of a call, as torch.utils.flop_counter.register_flop_formula takes it.
        plain: the outputs in torch's own operators, without looking at numbers, for torch.onnx.export. None: it is an
            error there.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    op = packet.default

    def once(_ctx, *_gradients):
        raise NotImplementedError(f"{name} has no gradient of its own: the ops are once differentiable")

    def nothing(ctx, inputs, output):  # called with these names
        pass

    def forward_mode(_ctx, *_tangents):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, hessian): use grad, vjp or jacrev"
        )

    save, backward = save or nothing, backward or once

    def one_by_one(info, in_dims, *args):
        """vmap: a call for each example, since a kernel's tensors all have the batch axis or none has."""
        calls = [
            call(*(x.select(axis, i) if isinstance(axis, int) else x for x, axis in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_autograd(op, backward, setup_context=save, lib=_library)
    torch.library.register_vmap(op, one_by_one, lib=_library)
    if flops is not None:
        register_flop_formula(packet)(flops)

    # The same for torch.func, whose grad does not go through register_autograd.
    methods = {
        "forward": lambda *args: op(*args),
        "setup_context": save,
        "backward": backward,
        "jvp": forward_mode,
        "vmap": one_by_one,
    }
    function = type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})

    def call(*args):
        if torch.compiler.is_dynamo_compiling():
            return op(*args)
        if _in_onnx_export():
            if plain is None:
                raise NotImplementedError(f"{name} has no form in torch's own operators to export to ONNX")
            return plain(*args)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)  # type: ignore[attr-defined]
        return op(*args)

    return call


def _in_onnx_export() -> bool:
    """Whether torch.onnx.export is at work, which knows torch's own operators alone."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def absent(x: Tensor) -> Tensor:
    """What stands for an output that a call does not have: an operator returns as many tensors every time."""
    return x.new_empty(0)


def laid_out_like(template: Tensor, x: Tensor) -> Tensor:
    """x with the strides of torch.empty_like(template): the fake output promised them, a backend may choose others."""
    wanted = torch.empty_like(template, device="meta").stride()
    if all(size <= 1 or a == b for size, a, b in zip(x.shape, x.stride(), wanted, strict=True)):
        return x
    return torch.empty_like(template, dtype=x.dtype).copy_(x)
