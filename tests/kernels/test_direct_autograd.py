"""Direct calls with gradients among what autograd has: checkpoints, hooks, modes, changes in place, garbage."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_transformer import kernels
from fused_transformer.kernels import _direct, _node, use_backend
from fused_transformer.kernels._dispatch import Op, observe
from fused_transformer.kernels.attention import self_attention
from tests.inputs import normal
from tests.kernels.test_direct import added_norm, linear_entropy
from tests.kernels.test_direct_gradients import (
    CALLS,
    INPUTS,
    SEED,
    attention,
    differentiable,
    dropped,
    gradients,
    leaves,
    prepared,
)
from tests.kernels.two_ways import assert_same, forbid_the_long_way, tensors_of

pytestmark = [
    pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}"),
    pytest.mark.usefixtures("recorded"),
]


@pytest.mark.parametrize("name", CALLS)
def test_once_differentiable(name):
    function, arguments, names = prepared(name)
    outputs = [x for x in tensors_of(function(**arguments)) if x.requires_grad]
    upstream = [torch.randn_like(x).requires_grad_() for x in outputs]
    first = torch.autograd.grad(outputs, [arguments[key] for key in names], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(sum(x.square().sum() for x in first), upstream[0])


@pytest.mark.parametrize("name", CALLS)
def test_what_was_saved_may_not_be_changed(name):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    saved = {"q": "keep", "x": "x", "tokens": "tokens", "logits": "targets"}
    first = next(key for key in saved if key in arguments)
    changed = saved[first] if saved[first] in arguments else "q"
    names = [key for key in differentiable(arguments) if key != changed]
    if changed == "x" and ("residual" in arguments or arguments.get("activation") == "relu"):
        pytest.skip("x is not saved")
    arguments = leaves(arguments, names)
    result = next(x for x in tensors_of(function(**arguments)) if x.requires_grad)
    arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_kept_or_lost(name):
    function, arguments, names = prepared(name)
    held = [x for x in arguments.values() if isinstance(x, Tensor)]

    def step() -> list:
        result = function(**arguments)
        found = (*tensors_of(result), *gradients(result, arguments, names))
        return [weakref.ref(x) for x in found if x is not None]

    step()
    gc.collect()
    before = [sys.getrefcount(x) for x in held]
    references = [reference for _ in range(20) for reference in step()]
    assert [sys.getrefcount(x) for x in held] == before
    assert all(reference() is None for reference in references)


def test_checkpointing_makes_the_call_again(monkeypatch):
    forbid_the_long_way(monkeypatch)
    torch.manual_seed(0)
    arguments = leaves(dropped(added_norm), INPUTS)
    names = [key for key in arguments if key in INPUTS]
    plain = kernels.add_layer_norm(**arguments)
    expected = gradients(plain, arguments, names)
    again = checkpoint(lambda: kernels.add_layer_norm(**arguments), use_reentrant=False)
    assert_same(gradients(again, arguments, names), expected)


def test_a_mode_sees_the_backward_pass(monkeypatch):
    """What looks on at operators when the gradient is taken finds what the long way does; the numbers are the same."""
    torch.manual_seed(0)
    arguments = leaves(attention(), "qkv")
    out = kernels.attention(**arguments)
    expected = torch.autograd.grad(out.sum(), [arguments[key] for key in "qkv"], retain_graph=True)
    asked: list[str] = []
    on = Op.on
    monkeypatch.setattr(Op, "on", lambda op, x: (asked.append(op.name), on(op, x))[1])
    with FlopCounterMode(display=False):
        got = torch.autograd.grad(out.sum(), [arguments[key] for key in "qkv"])
    assert asked == ["attention"]
    assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_pass_keeps_to_the_backend_of_the_forward_pass(name):
    function, arguments, names = prepared(name)
    expected = gradients(function(**arguments), arguments, names)
    result = function(**arguments)
    with use_backend("reference"):
        assert_same(gradients(result, arguments, names), expected)


def direct_name(function, direction: str) -> tuple[ModuleType, str]:
    """The module that makes an op's direct calls with gradients, and its name for those of this direction."""
    package = importlib.import_module(function.__module__)
    home = getattr(package, "differentiated", package)
    if direction == "backward":
        return home, "_direct_backward"
    return home, "direct_call" if hasattr(home, "direct_call") else "_direct_call"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_looked_at_halfway_goes_the_long_way(name, direction, monkeypatch):
    """Another thread may begin to observe between the question whether a gradient is wanted and the call itself, or
    between the forward and the backward pass."""
    function, arguments, names = prepared(name)
    expected = function(**arguments)
    expected_gradients = gradients(expected, arguments, names)
    home, attribute = direct_name(function, direction)
    call, refused = getattr(home, attribute), []

    def refusing(*args):
        if torch.is_grad_enabled():
            return call(*args)
        refused.append(args)
        return None

    monkeypatch.setattr(_node, "KEEP", False)  # a node is not in its hands: see test_node.py
    monkeypatch.setattr(home, attribute, refusing)
    got = function(**arguments)
    got_gradients = gradients(got, arguments, names)
    assert refused
    assert_same(got, expected)
    assert_same(got_gradients, expected_gradients)


@pytest.mark.parametrize("first_is_direct", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_checkpoint_may_go_the_other_way_the_second_time(name, first_is_direct):
    """As on a GPU, where the first call of a process is never direct: both ways must save the same tensors."""
    function, arguments, names = prepared(name)
    expected = gradients(function(**arguments), arguments, names)
    times: list[None] = []

    def call():
        times.append(None)
        looked_at = (len(times) == 1) != first_is_direct
        with observe(lambda *_: None) if looked_at else torch.enable_grad():
            return function(**arguments)

    result = checkpoint(call, use_reentrant=False)
    assert_same(gradients(result, arguments, names), expected)
    assert len(times) == 2


def apart(x: Tensor) -> Tensor:
    """The same numbers in another layout, as from a buffer with a pitch."""
    return torch.full((*x.shape, 2), 77, dtype=x.dtype)[..., 0].copy_(x)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_may_come_back_in_another_layout(name):
    function, arguments, names = prepared(name)
    expected = gradients(function(**arguments), arguments, names)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, apart):
        result = function(**arguments)
    assert_same(gradients(result, arguments, names), expected)


def test_garbage_that_calls_an_op_does_not_take_the_working_memory():
    """A finaliser runs wherever torch allocates; under AddressSanitizer this test says more."""

    class Garbage:
        def __init__(self, size: int):
            self.itself, self.size = self, size

        def __del__(self):
            with torch.no_grad():
                kernels.cross_entropy(torch.ones(self.size, 3), torch.zeros(self.size, dtype=torch.int64))

    torch.manual_seed(0)
    x, weight, bias = (normal(*shape).requires_grad_() for shape in ((40, 64), (64,), (64,)))
    y = kernels.layer_norm(x, weight, bias)
    upstream = torch.ones_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias), upstream, retain_graph=True)
    before = gc.get_threshold()
    try:
        gc.set_threshold(1)
        for round in range(200):
            Garbage(1000 + 500 * round)
            assert_same(torch.autograd.grad(y, (x, weight, bias), upstream, retain_graph=True), expected)
    finally:
        gc.set_threshold(*before)


def test_autocast_asks_without_copying():
    """float32 queries, of which autocast would make others: to find that out no copy is made."""
    q = normal(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        kernels.attention(q, q, q)
    copies = sum(event.count for event in profile.key_averages() if event.key == "aten::to")
    assert copies <= 3


def of_qkv() -> dict:
    return {"qkv": normal(2, 6, 3 * 2 * 16), "heads": 2, "causal": True, "dropout_p": 0.25, "seed": SEED}


COMPILED = {name: CALLS[name] for name in ("attention", "add_layer_norm", "embedding", "gelu", "cross_entropy")}
COMPILED |= {"self_attention": (self_attention, of_qkv), "in chunks": (kernels.linear_cross_entropy, linear_entropy)}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize("long_way", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_autograd_does_not_look_into_a_backward_pass(name, long_way):
    """It would free what a kernel still works on, which no result need show: the process may just end."""
    function, make = COMPILED[name]
    torch.manual_seed(0)
    arguments = make()
    names = [*differentiable(arguments), *(key for key in ("qkv", "hidden") if key in arguments)]
    arguments = leaves(arguments, names)
    with observe(lambda *_: None) if long_way else torch.enable_grad():
        result = next(x for x in tensors_of(function(**arguments)) if x.requires_grad)
    upstream = torch.randn_like(result)
    inputs = [arguments[key] for key in names]
    expected = torch.autograd.grad(result, inputs, upstream, retain_graph=True)
    for _ in range(3):
        for x in inputs:
            x.grad = None
        with compiled_autograd._enable(torch.compile(backend="eager")):
            result.backward(upstream, retain_graph=True, inputs=inputs)
        assert_same(tuple(x.grad for x in inputs), expected)
