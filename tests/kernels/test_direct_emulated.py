"""Direct calls on CUDA without a GPU: the C++ of a GPU's build, whose kernels tests/csrc/emulator runs on the CPU.

What they give is what kernels/<op>/cuda.py gives by the long way round, bit for bit, gradients too. What only a device
can show, streams and several devices, is in test_direct_cuda.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fused_transformer import kernels
from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._dispatch import Op
from tests import emulated
from tests.inputs import normal, running_on
from tests.kernels import test_direct, test_direct_gradients
from tests.kernels.two_ways import assert_same, forbid_the_long_way, tensors_of

pytestmark = [
    pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_direct_cuda.py has a device"),
]
CALLS = {**test_direct.CALLS, **test_direct_gradients.CALLS}
# A packed batch's longest sequence is on the GPU; the loss in chunks is products, a sum over rows torch's own.
ELSEWHERE = ("packed", "linear_cross_entropy", "cross_entropy in all")


def told_of_a_device(op: str, hopper: bool = False):
    """The emulated module of the op, connected with torch and with the emulator as device 0."""
    module = emulated.load(op)
    assert module.connect(*_direct.links()[:-2], lambda _device: 0, lambda: 0)
    assert module.direct_device(0, torch.device("cpu"), 2, 9, 0)
    if op == "attention":
        module.attention_direct_hopper(hopper)
    return module


@pytest.fixture
def on_device(monkeypatch):
    """Runs a function whose direct calls are those of a CUDA build. No backend may be chosen meanwhile."""
    if not emulated.installed():
        pytest.skip("the emulator needs a C++ compiler")

    def run(function, op: str, *, hopper: bool = False):
        native = told_of_a_device(op, hopper)
        package = importlib.import_module(f"fused_transformer.kernels.{op}")
        with monkeypatch.context() as patch:
            patch.setattr(_node, "KEEP", False)  # a node would call the backward passes of the CPU's build
            for owner in (package, getattr(package, "differentiated", package)):
                for attribute in ("direct_call", "_direct_call", "_direct_backward"):
                    name = f"{op}_backward_direct" if "backward" in attribute else f"{op}_direct"
                    if hasattr(owner, attribute):
                        patch.setattr(owner, attribute, getattr(native, name))
            forbid_the_long_way(patch)
            if op == "embedding":  # its tokens must be sorted before a backward pass
                patch.setattr(Op, "on", lambda op, _: op.module("cuda"))
            return function()

    return run


def arguments_of(name: str, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    made = CALLS[name][1]()
    if "k_lengths" in made:
        made["keep"] = None  # its bits want memory
    if "reduction" not in made and "logits" in made and "k" not in made:
        made["reduction"] = "none"  # the sum is torch's own
    cast = {key for key, x in made.items() if isinstance(x, Tensor) and x.is_floating_point() and key != "addend"}
    return {key: x.to(dtype) if key in cast else x for key, x in made.items()}


def op_of(function) -> str:
    return function.__module__.removeprefix("fused_transformer.kernels.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ELSEWHERE])
def test_results_are_those_of_the_cuda_backend(name, dtype, on_device):
    function, arguments = CALLS[name][0], arguments_of(name, dtype)
    with running_on("cuda"):
        expected = function(**arguments)
    assert_same(on_device(lambda: function(**arguments), op_of(function)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in test_direct_gradients.CALLS if name not in ELSEWHERE])
def test_gradients_are_those_of_the_cuda_backend(name, dtype, on_device):
    function, arguments = CALLS[name][0], arguments_of(name, dtype)
    names = test_direct_gradients.differentiable(arguments)
    arguments = test_direct_gradients.leaves(arguments, names)

    def both() -> tuple:
        result = function(**arguments)
        return (*tensors_of(result), *test_direct_gradients.gradients(result, arguments, names))

    with running_on("cuda"):
        expected = both()
    assert_same(on_device(both, op_of(function)), expected)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_more_than_a_tile(dtype, heads, on_device):
    torch.manual_seed(0)
    q = normal(1, 70, 2, 32, dtype=dtype).transpose(1, 2).requires_grad_()
    k, v = (normal(1, heads, 90, 32, dtype=dtype).requires_grad_() for _ in range(2))
    upstream = normal(1, 70, 2, 32, dtype=dtype).transpose(1, 2)
    masks = {"k_lengths": torch.tensor([81]), "causal": "bottom_right"}

    def both() -> tuple:
        out = kernels.attention(q, k, v, **masks)
        return (out, *torch.autograd.grad(out, (q, k, v), upstream))

    with running_on("cuda"):
        expected = both()
    assert_same(on_device(both, "attention"), expected)


def test_attention_on_hopper(on_device):
    """Its own forward kernel, and the backward pass that all GPUs have."""
    from fused_transformer.kernels.attention import cuda_sm90

    torch.manual_seed(0)
    q, k, v = (normal(1, 2, 140, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3))

    def both() -> tuple:
        out, lse = kernels.attention_with_lse(q, k, v, causal="top_left")
        return (out, lse, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))

    with emulated.capability(9, 0):
        with running_on("cuda"), cuda_sm90.switched(True):
            expected = both()
        with running_on("cuda"), cuda_sm90.switched(False):
            other = both()
        assert not torch.equal(expected[0], other[0]), "the two kernels differ in the last bits, or nothing is shown"
        assert_same(on_device(both, "attention", hopper=True), expected)
        assert_same(on_device(both, "attention", hopper=False), other)


def test_rows_that_several_blocks_sum_over(on_device):
    torch.manual_seed(0)
    x, weight, bias = (normal(*shape).requires_grad_() for shape in ((67, 40), (40,), (40,)))

    def norm() -> tuple:
        y = kernels.layer_norm(x, weight, bias)
        return (y, *torch.autograd.grad(y.square().sum(), (x, weight, bias)))

    def activated() -> tuple:
        y = kernels.bias_act(x, bias, activation="gelu")
        return (y, *torch.autograd.grad(y.square().sum(), (x, bias)))

    for op, both in (("layer_norm", norm), ("bias_act", activated)):
        with running_on("cuda"):
            expected = both()
        assert_same(on_device(both, op), expected)


def test_the_emulated_device_is_a_device():
    """The direct calls of these modules see CPU tensors as its tensors, or the tests above would test the CPU."""
    if not emulated.installed():
        pytest.skip("the emulator needs a C++ compiler")
    module = told_of_a_device("cross_entropy")
    logits, targets = normal(3, 5), torch.tensor([1, 2, 3])
    assert module.cross_entropy_direct(logits, targets, 0.0, "uniform", 0.0, -100, "mean", False) is None
    assert module.cross_entropy_direct(logits, targets, 0.0, "uniform", 0.0, -100, "none", False) is not None
