"""Autograd's nodes in C++ (csrc/with_torch): ways of a backward pass beside the direct one, and when there are none.

That results and gradients are those of the long way is in test_direct_gradients.py and test_direct_autograd.py.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_transformer import kernels
from fused_transformer.kernels import _node
from tests.inputs import normal
from tests.kernels.test_direct_gradients import CALLS, gradients, leaves, prepared
from tests.kernels.two_ways import assert_same, tensors_of

pytestmark = pytest.mark.skipif(_node.WHY_NONE is not None, reason=f"no nodes: {_node.WHY_NONE}")


def is_node(x: torch.Tensor) -> bool:
    return x.grad_fn is not None and x.grad_fn.name().startswith("Fused")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_node(name):
    function, arguments, _ = prepared(name)
    function(**arguments)  # makes the table of positions
    assert all(is_node(x) for x in tensors_of(function(**arguments)) if x.requires_grad)


@pytest.mark.parametrize("name", CALLS)
def test_what_the_direct_call_refuses_is_done_by_python(name):
    """Operators that somebody looks on at are no direct call's."""
    function, arguments, names = prepared(name)
    expected = gradients(function(**arguments), arguments, names)
    result = function(**arguments)
    with FlopCounterMode(display=False):
        got = gradients(result, arguments, names)
    assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_twice_through_one_graph(name):
    function, arguments, names = prepared(name)
    result = next(x for x in tensors_of(function(**arguments)) if x.requires_grad)
    inputs = [arguments[key] for key in names]
    first = torch.autograd.grad(result.sum(), inputs, retain_graph=True, allow_unused=True)
    assert_same(torch.autograd.grad(result.sum(), inputs, allow_unused=True), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(result.sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("seeded", [False, True])
def test_a_bias_of_attention_has_a_gradient(seeded, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (normal(2, 4, 5, 16).requires_grad_() for _ in range(3))
    bias = normal(4, 5, 5).requires_grad_()
    options = {"dropout_p": 0.25, "seed": torch.tensor([7])} if seeded else {}
    upstream = normal(2, 4, 5, 16)

    def both() -> tuple:
        out = kernels.attention(q, k, v, bias=bias, **options)
        assert is_node(out) == (_node.KEEP is None)
        return (out, *torch.autograd.grad(out, (q, k, v, bias), upstream))

    got = both()
    monkeypatch.setattr(_node, "KEEP", False)
    assert_same(got, both())


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """A graph task that ends at one input wants no other gradient."""
    x, weight, bias = (normal(*shape).requires_grad_() for shape in ((3, 8), (8,), (8,)))
    y = kernels.layer_norm(x, weight, bias)
    expected = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), retain_graph=True)
    for i, leaf in enumerate((x, weight, bias)):
        (got,) = torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)
        assert_same(got, expected[i])


def test_hooks_and_retained_gradients():
    x = normal(3, 8).requires_grad_()
    y = kernels.layer_norm(x)
    seen: list = []
    y.retain_grad()
    y.register_hook(lambda g: seen.append("tensor"))
    y.grad_fn.register_prehook(lambda _g: seen.append("before"))
    y.grad_fn.register_hook(lambda _gi, _go: seen.append("after"))
    assert [fn for fn, _ in y.grad_fn.next_functions if fn is not None] == [
        torch.autograd.graph.get_gradient_edge(x).node
    ]
    (y * 2).sum().backward()
    assert seen == ["tensor", "before", "after"]
    assert torch.equal(y.grad, torch.full_like(y, 2.0)) and x.grad is not None


def test_an_anomaly_tells_where_the_call_was():
    x = normal(3, 8).requires_grad_()
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="test_an_anomaly_tells"):
        y = kernels.layer_norm(x)
        with pytest.raises(RuntimeError, match=r"FusedLayerNormBackward.*nan"):
            y.backward(torch.full_like(y, float("nan")))


def test_an_error_of_pythons_way_is_the_callers(monkeypatch):
    x = normal(3, 8).requires_grad_()
    y = kernels.layer_norm(x)
    module = import_module("fused_transformer.kernels.layer_norm")

    def broken(*_):
        raise KeyError("a word")

    monkeypatch.setattr(module._LayerNorm, "backward", broken)
    with FlopCounterMode(display=False), pytest.raises(KeyError, match="a word"):
        y.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, _gradient):
        return None


@pytest.mark.parametrize("name", CALLS)
def test_where_no_gradient_comes_none_goes_on(name):
    function, arguments, names = prepared(name)
    for result in tensors_of(function(**arguments)):
        if result.requires_grad:
            found = torch.autograd.grad(
                NoGradient.apply(result).sum(), [arguments[key] for key in names], allow_unused=True
            )
            assert all(gradient is None for gradient in found)


def test_an_error_of_another_threads_backward_pass_is_the_callers():
    """As on a GPU, where torch's own threads run the nodes."""
    x = normal(3, 8).requires_grad_()
    found: list = []

    def work():
        y = kernels.layer_norm(x)
        try:
            with FlopCounterMode(display=False):
                y.backward(torch.ones_like(y), retain_graph=True)
                y.register_hook(lambda _: {}["a word"])
                y.backward(torch.ones_like(y))
        except KeyError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1 and "a word" in str(found[0])


def test_a_profile_names_the_op():
    x = normal(3, 8).requires_grad_()
    with torch.profiler.profile() as profiled:
        y = kernels.layer_norm(x)
        y.sum().backward()
    assert {"_LayerNorm", "_LayerNormBackward"} <= {event.key for event in profiled.key_averages()}
    assert is_node(kernels.layer_norm(x))


def test_a_long_graph_is_freed():
    """Node by node, and not by a recursion that would end the process."""
    x = normal(1, 4).requires_grad_()
    y = x
    for _ in range(100_000):
        y = kernels.rms_norm(y)
    del y
    assert kernels.rms_norm(x).requires_grad


def test_two_threads_go_through_one_graph():
    x, weight = normal(64, 32).requires_grad_(), normal(32).requires_grad_()
    y = kernels.layer_norm(x, weight)
    upstream = normal(64, 32)
    expected = torch.autograd.grad(y, (x, weight), upstream, retain_graph=True)
    found: list = []

    def work():
        for _ in range(50):
            found.append(torch.autograd.grad(y, (x, weight), upstream, retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    for got in found:
        assert_same(got, expected)


def test_a_large_result_is_a_node_and_no_view():
    x = normal(1100, 1024).requires_grad_()  # beyond 4 MB results lie in memory of our own
    y = kernels.layer_norm(x)
    y.mul_(2)
    y.sum().backward()
    assert not y._is_view() and x.grad.shape == x.shape


def test_parameters_of_another_dtype_keep_it():
    arguments = leaves({"x": normal(3, 8, dtype=torch.bfloat16), "weight": normal(8), "bias": normal(8)}, "x")
    for key in ("weight", "bias"):
        arguments[key].requires_grad_()
    for mode in (FlopCounterMode(display=False), torch.enable_grad()):
        y = kernels.layer_norm(**arguments)
        with mode:
            found = torch.autograd.grad(y.float().sum(), list(arguments.values()))
        assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_plan_that_asks_for_what_is_not_there():
    library = import_module("fused_transformer.kernels._torch")
    y, x = normal(3), normal(3).requires_grad_()
    with pytest.raises(ValueError, match="no plan"):
        library.make_plan("Name", len, len, "x0")
    for source in ("g1", "s1", "c1"):
        plan = library.make_plan("Name", len, len, source)
        with pytest.raises(ValueError, match=f"Name has no {source}"):
            library.attach(plan, (y,), (x,), (x,), (1,))
    with pytest.raises(TypeError):
        library.attach(plan, (y,), (x,), (x,))
    with pytest.raises(TypeError, match="tensors or None"):
        library.attach(library.make_plan("Name", len, len, "g0"), (3,), (x,), (x,), ())


def test_another_release_of_torch_gets_no_nodes(monkeypatch):
    monkeypatch.setattr(import_module("fused_transformer.kernels._torch"), "torch_version", "1.0.0")
    library, why = _node._found()
    assert library is None and "compiled for torch 1.0.0: reinstall" in why


def test_nodes_can_be_turned_off():
    code = "from fused_transformer.kernels import _node; print(_node.KEEP, _node.WHY_NONE)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"FUSED_TRANSFORMER_NODES": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False FUSED_TRANSFORMER_NODES=0 turned them off"
