"""Direct calls among function modes, interrupts and odd tables of torch's; odd layouts and packed batches."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from fused_transformer import kernels
from fused_transformer.kernels import _direct, _native, _node
from fused_transformer.kernels.embedding import positions
from tests.inputs import normal
from tests.kernels.two_ways import assert_same, integers
from tests.oracle import assert_equal

pytestmark = pytest.mark.skipif(_direct.WHY_NONE is not None, reason=f"no direct calls: {_direct.WHY_NONE}")


class Disturbing(TorchFunctionMode):
    """Does something when a tensor is asked whether it requires a gradient."""

    def __init__(self, disturb):
        super().__init__()
        self.disturb = disturb

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "__get__":
            self.disturb()
        return function(*args, **(kwargs or {}))


@pytest.fixture
def by_python():
    """Direct calls ask torch's Python functions, which run whatever is in the way."""
    _native.library().direct_use_functions(None)
    yield
    if _node.WHY_NONE is None:
        _native.library().direct_use_functions(import_module("fused_transformer.kernels._torch").functions)


def test_a_table_of_positions_that_goes_meanwhile_is_held(monkeypatch, by_python):
    monkeypatch.setattr(positions, "TABLES", {})
    tokens, table = integers(3, 0, 10).view(1, 3), normal(11, 6)
    expected = kernels.embedding(tokens, table)
    with Disturbing(positions.TABLES.clear):
        for _ in range(5):
            assert torch.equal(kernels.embedding(tokens, table), expected)


def test_an_interrupt_is_not_lost(by_python):
    def interrupt():
        raise KeyboardInterrupt

    with Disturbing(interrupt), pytest.raises(KeyboardInterrupt):
        kernels.layer_norm(normal(3, 8))


def test_what_is_no_table_of_torch_connects_nothing(monkeypatch):
    for other in (12345, _native.library()):
        monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", other)
        assert _direct._connected() is not None
    x = normal(3, 8)
    arguments = (x, None, None, None, None, None, 1e-5, 0.0, False, False, False)
    assert _native.library().layer_norm_direct(*arguments) is not None


def test_it_connects_where_tensors_are_fake():
    with FakeTensorMode():
        assert _direct._connected() is None


def test_queries_that_overlap(indirect):
    q = normal(1, 1, 12).unfold(2, 8, 1)  # torch.empty_like has another axis innermost
    expected = torch.nn.functional.scaled_dot_product_attention(*[q.contiguous()] * 3)  # torch 2.13 is wrong here too
    for run in (lambda f, *a: f(*a), indirect):
        assert_close(run(kernels.attention, q, q, q), expected)
        x = q.detach().requires_grad_()
        k = q.contiguous()
        got = torch.autograd.grad(run(kernels.attention, x, k, k).square().sum(), x)[0]
        dense = k.clone().requires_grad_()
        wanted = torch.autograd.grad(kernels.attention(dense, k, k).square().sum(), dense)[0]
        assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(5, 7), (5, 1), (1, 1)])
def test_the_sign_of_a_conjugates_imaginary_part(shape, indirect):
    q, half = normal(1, 2, 5, 8), normal(*shape)
    k = normal(1, 2, 7, 8)
    bias = torch.conj(torch.complex(half, half)).imag
    expected = kernels.attention_with_lse(q, k, k, bias=-half)
    for run in (lambda f, *a, **kw: f(*a, **kw), indirect):
        assert_equal(run(kernels.attention_with_lse, q, k, k, bias=bias), expected)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [None, (1, -1), (2, 0)])
def test_packed_batches_with_other_masks(causal, window, direct, indirect):
    torch.manual_seed(0)
    q, k = normal(9, 4, 8), normal(11, 2, 8)
    arguments = {"q": q, "k": k, "v": k, "causal": causal, "window": window}
    arguments |= {"q_offsets": integers(0, 2, 2, 9), "k_offsets": integers(0, 5, 6, 11)}
    for k_lengths in (None, integers(5, 0, 3)):
        masks = arguments | {"k_lengths": k_lengths}
        assert_same(direct(kernels.attention_with_lse, **masks), indirect(kernels.attention_with_lse, **masks))


def test_the_layout_that_models_have(direct, indirect):
    q, k, v = normal(2, 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
    got = direct(kernels.attention_with_lse, q=q, k=k, v=v)
    assert not got[0].is_contiguous()
    assert_same(got, indirect(kernels.attention_with_lse, q, k, v))
