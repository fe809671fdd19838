"""Direct calls (csrc/common/bind_direct.h): what they give, and when they leave a call to the long way round.

The long way is the measure throughout: with and without direct calls an op gives the same numbers in the same layout,
or the same error, whatever it is called with.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fused_transformer import kernels
from fused_transformer.kernels import _direct, _native, use_backend
from fused_transformer.kernels._dispatch import observe
from tests.inputs import normal
from tests.kernels.two_ways import assert_same, integers, tensors_of

pytestmark = pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}")


def attention() -> dict:
    return {
        **{"q": normal(2, 4, 5, 8), "k": normal(2, 2, 7, 8), "v": normal(2, 2, 7, 8)},
        **{"keep": torch.rand(2, 1, 5, 7) < 0.7, "bias": normal(4, 1, 7), "causal": "bottom_right"},
        **{"window": (3, -1), "k_lengths": integers(3, 7), "scale": 0.3},
    }


def packed() -> dict:
    tensors = {"q": normal(5, 4, 8), "k": normal(9, 2, 8), "v": normal(9, 2, 8)}
    return tensors | {"q_offsets": integers(0, 2, 5), "k_offsets": integers(0, 3, 9), "causal": "top_left"}


def added_norm() -> dict:
    tensors = {"x": normal(3, 5, 24), "residual": normal(3, 5, 24)}
    return tensors | {name: normal(24) for name in ("weight", "bias", "x_bias")} | {"eps": 1e-3}


def embedded() -> dict:
    return {"tokens": integers(3, 0, 10, 2, 2, 7).view(2, 3), "table": normal(11, 6), "padding_idx": 2, "start": 4}


def activated() -> dict:
    return {"x": normal(3, 5, 24), "bias": normal(24), "activation": "gelu_tanh"}


def entropy() -> dict:
    tensors = {"logits": normal(4, 5, 33), "targets": torch.randint(33, (4, 5))}
    return tensors | {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 2}


def linear_entropy() -> dict:
    tensors = {"hidden": normal(4, 5, 8), "weight": normal(33, 8), "bias": normal(33)}
    return tensors | {"targets": torch.randint(33, (4, 5)), "label_smoothing": 0.1}


def top_k() -> dict:
    return {"logits": normal(6, 33), "k": 5, "beams": 3, "addend": normal(6)}


CALLS = {
    "attention": (kernels.attention, attention),
    "attention_with_lse": (kernels.attention_with_lse, attention),
    "packed": (kernels.attention_with_lse, packed),
    "layer_norm": (kernels.layer_norm, lambda: {"x": normal(7, 24), "weight": normal(24), "bias": normal(24)}),
    "rms_norm": (kernels.rms_norm, lambda: {"x": normal(2, 3, 24), "weight": normal(24)}),
    "add_layer_norm": (kernels.add_layer_norm, added_norm),
    "add_layer_norm_with_total": (kernels.add_layer_norm_with_total, added_norm),
    "add_rms_norm_with_total": (
        kernels.add_rms_norm_with_total,
        lambda: {"x": normal(3, 24), "residual": normal(3, 24)},
    ),
    "embedding": (kernels.embedding, embedded),
    "bias_act": (kernels.bias_act, activated),
    "cross_entropy": (kernels.cross_entropy, entropy),
    "cross_entropy of one": (kernels.cross_entropy, lambda: {"logits": normal(1, 33), "targets": integers(4)}),
    "cross_entropy of each": (kernels.cross_entropy, lambda: entropy() | {"reduction": "none"}),
    "cross_entropy in all": (kernels.cross_entropy, lambda: entropy() | {"reduction": "sum"}),
    "linear_cross_entropy": (kernels.linear_cross_entropy, linear_entropy),
    "log_softmax_top_k": (kernels.log_softmax_top_k, top_k),
}


ROUNDED = ("linear_cross_entropy",)  # a few rows' products are torch's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_a_direct_call_gives_what_the_long_way_gives(name, dtype, direct, indirect):
    function, make = CALLS[name]
    if name == "linear_cross_entropy" and dtype != torch.float32:
        pytest.skip("16-bit products are rounded as the long way rounds them")
    torch.manual_seed(0)
    arguments = {
        key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and key != "addend" else x
        for key, x in make().items()
    }
    indirect(function, **arguments)  # which makes the table of positions that the embedding looks up
    assert_same(direct(function, **arguments), indirect(function, **arguments), name in ROUNDED)


@pytest.mark.parametrize("name", CALLS)
def test_parameters_and_inference_mode(name, direct, indirect):
    function, make = CALLS[name]
    torch.manual_seed(0)
    arguments = {
        key: torch.nn.Parameter(x) if isinstance(x, Tensor) and x.is_floating_point() and key not in "xq" else x
        for key, x in make().items()
    }
    arguments = {key: x.data if key in ("hidden", "logits") else x for key, x in arguments.items()}
    indirect(function, **arguments) if "logits" not in arguments else None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(direct(function, **arguments), indirect(function, **arguments), name in ROUNDED)


class Mine(Tensor):
    pass


def odd_values(value) -> dict:
    """What somebody might pass instead of an argument."""
    odd: dict = {"None": None, "text": "no", "a number": 3, "a fraction": 0.25, "a list": [1.0], "minus": -1}
    if isinstance(value, Tensor):
        odd |= {
            "float64": value.double(),
            "bfloat16": value.bfloat16(),
            "int32": value.int(),
            "bool": value.bool(),
            "transposed": value.t() if value.dim() == 2 else value.movedim(0, -1),
            "sliced": torch.cat([value, value], -1)[..., ::2] if value.dim() else value,
            "apart": torch.stack([value, value], 0 if value.dim() < 2 else 1).unbind(0 if value.dim() < 2 else 1)[0],
            "longer": torch.cat([value, value], -1) if value.dim() else value,
            "expanded": value[:1].expand_as(value) if value.dim() else value,
            "empty": value[:0] if value.dim() else value,
            "flat": value.flatten(),
            "one axis more": value[None],
            "meta": value.to("meta"),
            "sparse": value.to_sparse(),
            "a subclass": value.as_subclass(Mine),
            "with a gradient": value.detach().clone().requires_grad_() if value.is_floating_point() else value,
            "conjugate's": torch.conj(torch.complex(value, value)).imag if value.dtype == torch.float32 else value,
            "negative": -value if value.dtype != torch.bool else value,
            "huge": value + 10**6 if value.dtype == torch.int64 else value,
            "NaN": value * float("nan") if value.is_floating_point() else value,
        }
    return odd


def outcome(run, function, arguments: dict):
    arguments = {key: copy.copy(x) if isinstance(x, list) else x for key, x in arguments.items()}
    try:
        return run(function, **arguments)
    except Exception as error:  # whatever it is, it must be the same both ways
        return error


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments_give_the_same_result_or_the_same_error(name, indirect):
    function, make = CALLS[name]
    torch.manual_seed(0)
    plain = make()
    compared = 0
    for key, value in plain.items():
        for odd, other in odd_values(value).items():
            arguments = plain | {key: other}
            got = outcome(lambda f, **k: f(**k), function, arguments)
            expected = outcome(indirect, function, arguments)
            case = f"{key} is {odd}: {got!r:.80} and {expected!r:.80}"
            if isinstance(expected, Exception):
                words = odd != "sparse"  # torch's own, which differ from call to call
                assert type(got) is type(expected) and (str(got) == str(expected) or not words), case
            elif any(x.is_meta for x in tensors_of(expected)):
                assert all(x.is_meta for x in tensors_of(got)), case
            else:
                assert not isinstance(got, Exception), case
                assert_same(got, expected, name in ROUNDED)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("left_out", ["weight", "bias", "x_bias", "keep", "k_lengths", "window", "k_offsets"])
def test_optional_arguments(left_out, direct, indirect):
    torch.manual_seed(0)
    for function, make in CALLS.values():
        arguments = make()
        if left_out in arguments and "hidden" not in arguments:
            if left_out == "k_offsets":
                arguments |= {"k": normal(5, 2, 8), "v": normal(5, 2, 8)}
            del arguments[left_out]
            assert_same(direct(function, **arguments), indirect(function, **arguments))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operator():
    x = normal(3, 8)
    with Seen() as seen:
        kernels.layer_norm(x)
    assert any("fused_transformer.layer_norm" in name for name in seen.names)


def test_an_observer_and_a_forced_backend_are_heeded():
    x, told = normal(3, 8), []
    with observe(lambda op, backend, _arguments: told.append((op.name, backend))):
        kernels.layer_norm(x)
    assert told == [("layer_norm", "cpu")]
    with use_backend("reference"), observe(lambda op, backend, _arguments: told.append((op.name, backend))):
        kernels.layer_norm(x)
    assert told[-1] == ("layer_norm", "reference")
    with use_backend("cuda"), pytest.raises(NotImplementedError, match="cuda"):
        kernels.layer_norm(x)


def test_autocast_is_heeded():
    q = normal(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.attention(q, q, q).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_derivatives_are_taken():
    x = normal(3, 8)
    assert kernels.layer_norm(x.requires_grad_()).grad_fn is not None
    x = x.detach()
    got = torch.func.grad(lambda x: kernels.layer_norm(x)[0, 0])(x)
    assert got.abs().sum() > 0
    assert torch.func.vmap(kernels.layer_norm)(x).shape == x.shape
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        kernels.layer_norm(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_trace_has_the_operator():
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: kernels.layer_norm(x), (normal(3, 8),), check_trace=False)
    assert "fused_transformer::layer_norm" in str(traced.graph)


def test_a_token_outside_the_vocabulary_is_named():
    with pytest.raises(IndexError, match=r"tokens holds 11 at index \[1, 0\]"):
        kernels.embedding(integers(3, 0, 11, 2).view(2, 2), normal(11, 6))
    with pytest.raises(IndexError, match=r"targets holds -1 at index \[1\]"):
        kernels.cross_entropy(normal(2, 5), integers(4, -1))


def test_the_compiled_functions_count_their_arguments():
    with pytest.raises(TypeError, match="layer_norm_direct takes 11 arguments, got 1"):
        _native.library().layer_norm_direct(normal(3, 8))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_kept_or_lost(name):
    function, make = CALLS[name]
    arguments = make()
    held = [x for x in arguments.values() if isinstance(x, Tensor)]
    function(**arguments)
    gc.collect()
    before = [sys.getrefcount(x) for x in held]
    results = [weakref.ref(x) for _ in range(50) for x in tensors_of(function(**arguments))]
    assert [sys.getrefcount(x) for x in held] == before
    assert all(x() is None for x in results)


def test_threads_do_not_share_working_memory(indirect):
    calls = []
    for length in (3, 17, 64, 130):
        q, k = normal(2, 3, length, 16), normal(2, 3, length + 5, 16)
        calls.append(({"q": q, "k": k, "v": k}, indirect(kernels.attention, q, k, k)))

    def repeat(which: int) -> bool:
        arguments, expected = calls[which % len(calls)]
        return all(torch.equal(kernels.attention(**arguments), expected) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(repeat, range(16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool])
def test_the_extension_sees_what_torch_says(dtype):
    base = torch.zeros(4, 6, dtype=dtype)
    for x in (base, base[1:, 2:4], base.t(), base[:, :1], base[0, 0], base[:0], base.expand(3, 4, 6)):
        assert _direct._is_seen(x)
    assert _native.library().direct_view(torch.zeros(2, dtype=torch.float64))[1] == 6  # other: no kernel takes it
    for x in (base.to("meta"), base.as_subclass(Mine), base.tolist(), None):
        assert _native.library().direct_view(x) is None


def test_a_torch_of_another_kind_is_not_connected(monkeypatch):
    monkeypatch.setattr(_direct, "_is_seen", lambda _: False)
    assert "another way" in (_direct._connected() or "")
    monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__")
    assert "2.10" in (_direct._connected() or "")
