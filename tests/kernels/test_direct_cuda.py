"""Direct calls on a GPU: what they give is what the long way gives, on the current stream of the current device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fused_transformer import kernels
from fused_transformer.kernels import _direct, _native, use_backend
from tests.inputs import normal
from tests.kernels import test_direct_gradients
from tests.kernels.test_direct import CALLS
from tests.kernels.two_ways import assert_same, forbid_the_long_way, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}"),
]

# A mask's bits want memory, a packed batch's longest sequence is on the GPU, and the loss in chunks is products.
ELSEWHERE = ("packed", "linear_cross_entropy")


def arguments_of(name: str, dtype: torch.dtype, calls=CALLS) -> dict:
    torch.manual_seed(0)
    made = calls[name][1]()
    if "k_lengths" in made:
        made["keep"] = None
    cast = {key for key, x in made.items() if isinstance(x, Tensor) and x.is_floating_point() and key != "addend"}
    moved = {key: x.to(dtype) if key in cast else x for key, x in made.items()}
    return {key: x.cuda() if isinstance(x, Tensor) else x for key, x in moved.items()}


@pytest.fixture(autouse=True)
def _device_is_known():
    """The first call of a process goes the long way, which finds out whether the build serves the device."""
    kernels.layer_norm(torch.ones(2, 8, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ELSEWHERE])
def test_a_direct_call_gives_what_the_long_way_gives(name, dtype, direct):
    function, arguments = CALLS[name][0], arguments_of(name, dtype)
    with use_backend("cuda"):
        expected = function(**arguments)  # and makes the table of positions that the embedding looks up
    assert_same(direct(function, **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in test_direct_gradients.CALLS if name not in ELSEWHERE])
def test_gradients_are_those_of_the_long_way(name, dtype, direct, monkeypatch):
    calls = test_direct_gradients.CALLS
    function, arguments = calls[name][0], arguments_of(name, dtype, calls)
    names = test_direct_gradients.differentiable(arguments)
    arguments = test_direct_gradients.leaves(arguments, names)

    def both(**given) -> tuple:
        result = function(**given)
        return (*tensors_of(result), *test_direct_gradients.gradients(result, given, names))

    with use_backend("cuda"):
        expected = both(**arguments)
    if name != "embedding":  # its tokens must be sorted before a backward pass
        forbid_the_long_way(monkeypatch, "on")
    assert_same(direct(both, **arguments), expected)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("lengths", [(5, 7), (130, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gradients_of_longer_sequences(dtype, lengths, heads, direct, monkeypatch):
    """More than a tile, keys that query heads share, and the layout that models have."""
    torch.manual_seed(0)
    q = normal(2, lengths[0], 2, 64, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
    k, v = (normal(2, heads, lengths[1], 64, dtype=dtype, device="cuda").requires_grad_() for _ in range(2))
    upstream = normal(2, lengths[0], 2, 64, dtype=dtype, device="cuda").transpose(1, 2)
    k_lengths = torch.tensor([lengths[1], 3], device="cuda")

    def gradients() -> tuple:
        out = kernels.attention(q, k, v, k_lengths=k_lengths, causal="bottom_right")
        return (out, *torch.autograd.grad(out, (q, k, v), upstream))

    with use_backend("cuda"):
        expected = gradients()
    forbid_the_long_way(monkeypatch, "on")
    assert_same(direct(gradients), expected)


def test_gradients_under_autocast_are_direct(direct, monkeypatch):
    """As in a layer: products in bfloat16, the stream of residuals in float32."""
    torch.manual_seed(0)
    x = normal(4, 9, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
    residual, weight = (normal(*shape, device="cuda").requires_grad_() for shape in ((4, 9, 64), (64,)))
    q = normal(2, 4, 9, 32, dtype=torch.bfloat16, device="cuda").requires_grad_()

    def gradients() -> tuple:
        with torch.autocast("cuda", torch.bfloat16):
            y, out = kernels.add_layer_norm(x, residual, weight), kernels.attention(q, q, q)
        return (y, out, *torch.autograd.grad(y.sum() + out.sum(), (x, residual, weight, q)))

    with use_backend("cuda"):
        expected = gradients()
    assert expected[0].dtype == torch.float32 and expected[1].dtype == torch.bfloat16
    forbid_the_long_way(monkeypatch, "on")
    assert_same(direct(gradients), expected)


@pytest.mark.parametrize("hopper", [False, True])
def test_attention_takes_hoppers_kernel_where_it_is_switched_on(hopper, direct):
    from fused_transformer.kernels.attention import cuda_sm90

    arguments = {name: normal(2, 3, 150, 64, dtype=torch.bfloat16, device="cuda") for name in "qkv"}
    with cuda_sm90.switched(hopper):
        with use_backend("cuda"):
            expected = kernels.attention_with_lse(**arguments)
        assert_same(direct(kernels.attention_with_lse, **arguments), expected)


def test_no_attention_is_direct_before_hoppers_switch_was_read():
    """In a process whose first call is of another op, which makes the device known."""
    code = """
import torch
from fused_transformer import kernels
kernels.layer_norm(torch.ones(2, 8, device="cuda"))
q, k, v = torch.randn(3, 2, 3, 150, 128, dtype=torch.bfloat16, device="cuda")
first, second = kernels.attention(q, k, v), kernels.attention(q, k, v)
with kernels.use_backend("cuda"):
    expected = kernels.attention(q, k, v)
assert torch.equal(first, expected) and torch.equal(second, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_it_runs_on_the_current_stream():
    """Behind what is queued there: the numbers come late."""
    x, weight = normal(64, 512, device="cuda"), torch.ones(512, device="cuda")
    expected = kernels.layer_norm(x + 1, weight)
    late = torch.empty_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x + 1)
        got = kernels.layer_norm(late, weight)
    stream.synchronize()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_others_go_the_long_way(name):
    torch.manual_seed(0)
    function, make = CALLS[name]
    arguments = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in make().items()}
    with use_backend("cuda") if name == "packed" else torch.no_grad():
        expected = function(**arguments)
    assert_same(function(**arguments), expected, True)


def test_tensors_on_two_devices_get_the_long_ways_error():
    with pytest.raises(ValueError, match="all tensors must have the same device, got x: cuda:0, weight: cpu"):
        kernels.layer_norm(normal(3, 8, device="cuda"), normal(8))


def test_a_device_that_nobody_told_of_is_refused():
    assert _native.library().direct_device(-1, None, 1, 9, 0) is None
