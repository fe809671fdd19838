"""Direct calls where a gradient is wanted: forward and backward pass, measured against the long way round.

What autograd has around them, checkpoints and hooks, is in test_direct_autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_transformer import kernels
from fused_transformer.kernels import _direct
from fused_transformer.kernels._dispatch import observe
from tests.inputs import normal
from tests.kernels import test_direct
from tests.kernels.two_ways import assert_same, forbid_the_long_way, tensors_of

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


def differentiable(arguments: dict) -> list[str]:
    return [key for key in arguments if key in INPUTS and not (key == "bias" and "q" in arguments)]


def prepared(name: str) -> tuple[Callable, dict, list[str]]:
    """The function of CALLS, its arguments, and the names of those that are leaves."""
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(arguments)
    return function, leaves(arguments, names), names


def gradients(result, arguments: dict, names, seed: int = 1) -> tuple[Tensor | None, ...]:
    """Of a weighted sum of the outputs, with respect to `names`."""
    torch.manual_seed(seed)
    outputs = [x for x in tensors_of(result) if x.requires_grad]
    weights = [torch.randn_like(x) for x in outputs]
    return torch.autograd.grad(outputs, [arguments[key] for key in names], weights, allow_unused=True)


@pytest.fixture
def both_ways(indirect, monkeypatch, recorded):
    """Runs function(**arguments) and its gradients, by the long way and directly."""

    def run(function, arguments: dict, names):
        arguments = leaves(arguments, names)
        if "tokens" in arguments:
            indirect(function, **arguments)  # makes the table of positions
        expected = indirect(function, **arguments)
        expected_gradients = gradients(expected, arguments, names)
        with monkeypatch.context() as patch:
            forbid_the_long_way(patch)
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
    both_ways(function, arguments, differentiable(arguments))


@pytest.mark.parametrize("name", CALLS)
def test_each_input_may_be_the_only_one_with_a_gradient(name, both_ways):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    for key in differentiable(arguments):
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
    both_ways(function, arguments, differentiable(arguments))


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
    for function, make in CALLS.values():
        arguments = make()
        if left_out not in arguments:
            continue
        del arguments[left_out]
        both_ways(function, arguments, differentiable(arguments))
        seen += 1
    assert seen > 0


@pytest.mark.parametrize("name", CALLS)
def test_upstream_gradients_of_any_layout(name, indirect, recorded):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = make()
    names = differentiable(arguments)
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


def test_only_one_of_two_results_has_a_gradient(indirect, recorded):
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
def test_a_seed_is_drawn_where_none_is_given(name, recorded):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = {key: x for key, x in make().items() if key != "seed"}
    if "dropout_p" not in arguments:
        pytest.skip("drops nothing")
    results = []
    for long_way in (False, True):
        given = leaves(arguments, differentiable(arguments))
        torch.manual_seed(7)
        with observe(lambda *_: None) if long_way else torch.enable_grad():
            results.append(function(**given))
    assert_same(*results)


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
