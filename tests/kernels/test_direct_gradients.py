"""Direct calls where a gradient is wanted: forward and backward pass, measured against the long way round."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_transformer import kernels
from fused_transformer.kernels import _direct, use_backend
from fused_transformer.kernels._dispatch import Op, observe
from tests.inputs import normal
from tests.kernels import test_direct
from tests.kernels.two_ways import assert_same, tensors_of

pytestmark = pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}")

SEED = torch.tensor([20170612])


def attention() -> dict:
    """As the kernel on a CPU writes gradients where they belong: float32, and whole vectors."""
    tensors = {"q": normal(2, 4, 5, 16), "k": normal(2, 2, 7, 16), "v": normal(2, 2, 7, 16)}
    masks = {name: x for name, x in test_direct.attention().items() if name not in "qkv"}
    return tensors | masks | {"dropout_p": 0.25, "seed": SEED}


def packed() -> dict:
    tensors = {"q": normal(5, 4, 16), "k": normal(9, 2, 16), "v": normal(9, 2, 16)}
    return test_direct.packed() | tensors


def dropped(make) -> dict:
    return make() | {"dropout_p": 0.25, "seed": SEED}


CALLS = {
    "attention": (kernels.attention, attention),
    "attention_with_lse": (kernels.attention_with_lse, attention),
    "packed": (kernels.attention, packed),
    "layer_norm": test_direct.CALLS["layer_norm"],
    "rms_norm": test_direct.CALLS["rms_norm"],
    "add_layer_norm": (kernels.add_layer_norm, lambda: dropped(test_direct.added_norm)),
    "add_layer_norm_with_total": test_direct.CALLS["add_layer_norm_with_total"],
    "add_rms_norm_with_total": test_direct.CALLS["add_rms_norm_with_total"],
    "embedding": (kernels.embedding, lambda: dropped(test_direct.embedded)),
    "relu": (kernels.bias_act, lambda: dropped(test_direct.activated) | {"activation": "relu"}),
    "gelu": (kernels.bias_act, lambda: dropped(test_direct.activated) | {"activation": "gelu"}),
    "gelu_tanh": test_direct.CALLS["bias_act"],
    "cross_entropy": test_direct.CALLS["cross_entropy"],
    "cross_entropy of one": test_direct.CALLS["cross_entropy of one"],
    "cross_entropy of each": test_direct.CALLS["cross_entropy of each"],
    "cross_entropy in all": test_direct.CALLS["cross_entropy in all"],
}
# what is differentiated; the bias of attention has its gradient by the long way
INPUTS = ("q", "k", "v", "x", "residual", "x_bias", "weight", "bias", "table", "logits")


def leaves(arguments: dict, names) -> dict:
    """The arguments, those of `names` as leaves that want a gradient."""
    return {key: x.detach().clone().requires_grad_() if key in names else x for key, x in arguments.items()}


def differentiable(name: str, arguments: dict) -> list[str]:
    return [key for key in arguments if key in INPUTS and not (key == "bias" and "q" in arguments)]


def gradients(result, arguments: dict, names, seed: int = 1) -> tuple[Tensor | None, ...]:
    """Of a weighted sum of the outputs, with respect to `names`."""
    torch.manual_seed(seed)
    outputs = [x for x in tensors_of(result) if x.requires_grad]
    weights = [torch.randn_like(x) for x in outputs]
    return torch.autograd.grad(outputs, [arguments[key] for key in names], weights, allow_unused=True)


@pytest.fixture
def only_direct(monkeypatch):
    """No backend may be chosen or asked for, neither forward nor backward."""

    def long_way(op, *_args):
        raise AssertionError(f"{op.name} went the long way")

    monkeypatch.setattr(Op, "pick", long_way)
    monkeypatch.setattr(Op, "on", long_way)


@pytest.fixture
def both_ways(indirect, monkeypatch):
    """Runs function(**arguments) and its gradients, by the long way and directly."""

    def run(function, arguments: dict, names):
        arguments = leaves(arguments, names)
        if "tokens" in arguments:
            indirect(function, **arguments)  # makes the table of positions
        expected = indirect(function, **arguments)
        expected_gradients = gradients(expected, arguments, names)
        with monkeypatch.context() as patch:
            for way in ("pick", "on"):
                patch.setattr(Op, way, lambda op, *_: pytest.fail(f"{op.name} went the long way"))
            got = function(**arguments)
            got_gradients = gradients(got, arguments, names)
        assert_same(got, expected)
        assert [g is None for g in got_gradients] == [g is None for g in expected_gradients]
        assert_same(got_gradients, expected_gradients)

    return run


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_long_way(name, both_ways):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    both_ways(function, arguments, differentiable(name, arguments))


@pytest.mark.parametrize("name", CALLS)
def test_each_input_may_be_the_only_one_with_a_gradient(name, both_ways):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    for key in differentiable(name, arguments):
        both_ways(function, arguments, [key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", [name for name in CALLS if "attention" not in name and name != "packed"])
def test_sixteen_bits(name, wide, dtype, both_ways):
    function, make = CALLS[name]
    torch.manual_seed(0)
    parameters = ("weight", "bias", "x_bias")
    arguments = {
        key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and not (wide and key in parameters) else x
        for key, x in make().items()
    }
    both_ways(function, arguments, differentiable(name, arguments))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 63, 64, 65, 700])
def test_sums_over_many_rows(rows, both_ways):
    torch.manual_seed(0)
    x, weight, bias = normal(rows, 24), normal(24), normal(24)
    both_ways(kernels.layer_norm, {"x": x, "weight": weight, "bias": bias}, ("x", "weight", "bias"))
    both_ways(kernels.bias_act, {"x": x, "bias": bias}, ("x", "bias"))


def test_working_memory_beyond_what_a_thread_keeps(both_ways):
    torch.manual_seed(0)
    x = normal(300, 30_000)
    both_ways(kernels.layer_norm, {"x": x, "weight": normal(30_000), "bias": normal(30_000)}, ("weight", "bias"))


@pytest.mark.parametrize("left_out", ["weight", "bias", "x_bias", "keep", "k_lengths", "window", "scale"])
def test_optional_arguments(left_out, both_ways):
    torch.manual_seed(0)
    seen = 0
    for name, (function, make) in CALLS.items():
        arguments = make()
        if left_out not in arguments:
            continue
        del arguments[left_out]
        both_ways(function, arguments, differentiable(name, arguments))
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("name", CALLS)
def test_upstream_gradients_of_any_layout(name, indirect):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
    inputs = [arguments[key] for key in names]
    indirect(function, **arguments)
    for run in (lambda f, **k: f(**k), indirect):
        outputs = [x for x in tensors_of(run(function, **arguments)) if x.requires_grad]
        wide = [torch.randn(2 * x.numel()).view(*x.shape, 2)[..., 0] if x.dim() else torch.ones(()) for x in outputs]
        ones = [torch.ones(()).expand(x.shape) for x in outputs]
        for upstream in (wide, ones):
            dense = [x.contiguous() for x in upstream]
            got = torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)
            assert_same(got, torch.autograd.grad(outputs, inputs, dense, retain_graph=True))


def test_only_one_of_two_results_has_a_gradient(indirect):
    torch.manual_seed(0)
    arguments = leaves(test_direct.added_norm(), INPUTS)
    names = [key for key in arguments if key in INPUTS]
    for which in (0, 1):
        results = []
        for run in (lambda f, **k: f(**k), indirect):
            one = run(kernels.add_layer_norm_with_total, **arguments)[which]
            inputs = [arguments[key] for key in names]
            results.append(torch.autograd.grad(one.square().sum(), inputs, allow_unused=True))
        assert [x is None for x in results[0]] == [x is None for x in results[1]]
        assert_same(*results)


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_is_drawn_where_none_is_given(name):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = {key: x for key, x in make().items() if key != "seed"}
    if "dropout_p" not in arguments:
        pytest.skip("drops nothing")
    results = []
    for long_way in (False, True):
        given = leaves(arguments, differentiable(name, arguments))
        torch.manual_seed(7)
        with observe(lambda *_: None) if long_way else torch.enable_grad():
            results.append(function(**given))
    assert_same(*results)


@pytest.mark.parametrize("name", CALLS)
def test_once_differentiable(name):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
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
    names = [key for key in differentiable(name, arguments) if key != changed]
    if changed == "x" and ("residual" in arguments or arguments.get("activation") == "relu"):
        pytest.skip("x is not saved")
    arguments = leaves(arguments, names)
    result = next(x for x in tensors_of(function(**arguments)) if x.requires_grad)
    arguments[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_kept_or_lost(name):
    function, make = CALLS[name]
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
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


def test_checkpointing_makes_the_call_again(only_direct):
    torch.manual_seed(0)
    arguments = leaves(dropped(test_direct.added_norm), INPUTS)
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
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
    expected = gradients(function(**arguments), arguments, names)
    result = function(**arguments)
    with use_backend("reference"):
        assert_same(gradients(result, arguments, names), expected)


def home_of(function):
    """The module that makes the op's direct calls with gradients."""
    package = importlib.import_module(function.__module__)
    return getattr(package, "differentiated", package)


def direct_names(home) -> tuple[str, str]:
    return ("direct_call" if hasattr(home, "direct_call") else "_direct_call"), "_direct_backward"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_looked_at_halfway_goes_the_long_way(name, direction, monkeypatch):
    """Another thread may begin to observe between the question whether a gradient is wanted and the call itself, or
    between the forward and the backward pass."""
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
    expected = function(**arguments)
    expected_gradients = gradients(expected, arguments, names)
    home = home_of(function)
    attribute = direct_names(home)[direction == "backward"]
    call, refused = getattr(home, attribute), []

    def refusing(*args):
        if torch.is_grad_enabled():
            return call(*args)
        refused.append(args)
        return None

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
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
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


class Elsewhere:
    """Saved tensors that come back in another layout, as from a buffer with a pitch."""

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def unpack(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape, 2), 77, dtype=x.dtype)[..., 0]
        return wide.copy_(x)


@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_may_come_back_in_another_layout(name):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(name, arguments)
    arguments = leaves(arguments, names)
    expected = gradients(function(**arguments), arguments, names)
    with torch.autograd.graph.saved_tensors_hooks(Elsewhere.pack, Elsewhere.unpack):
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


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments_give_the_same_result_or_the_same_error(name, indirect):
    """As in test_direct.py, with every float tensor a leaf that wants a gradient."""
    function, make = CALLS[name]
    torch.manual_seed(0)
    plain = make()
    names = [key for key in plain if key in INPUTS]
    plain = leaves(plain, names)
    for key, value in plain.items():
        for odd, other in test_direct.odd_values(value.detach() if isinstance(value, Tensor) else value).items():
            if isinstance(other, Tensor) and other.is_floating_point() and key in names and odd != "sparse":
                other = other.detach().requires_grad_()
            arguments = plain | {key: other}

            def run(way, arguments=arguments):
                torch.manual_seed(5)  # of the seeds that are drawn
                result = way(function, **arguments)
                wanted = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
                outputs = [x for x in tensors_of(result) if x.requires_grad]
                if any(x.is_meta for x in outputs) or not outputs:
                    return result
                upstream = [torch.ones_like(x) for x in outputs]
                return (*tensors_of(result), *torch.autograd.grad(outputs, wanted, upstream, allow_unused=True))

            got = test_direct.outcome(run, lambda f, **k: f(**k), {})
            expected = test_direct.outcome(run, indirect, {})
            case = f"{key} is {odd}: {got!r:.80} and {expected!r:.80}"
            if isinstance(expected, Exception):
                assert type(got) is type(expected) and (str(got) == str(expected) or odd == "sparse"), case
            elif not any(x.is_meta for x in tensors_of(expected)):
                assert not isinstance(got, Exception), case
                assert_same(got, expected)
