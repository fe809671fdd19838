"""self_attention: q, k and v side by side. What is one call on a CPU gives the bits of attention's own functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels import (
    attention,
    attention_weights,
    attention_with_lse,
    observe,
    use_backend,
)
from fused_transformer.kernels.attention import self_attention, together
from tests.inputs import FLOATS, Case, case_id, dtype_id, normal
from tests.oracle import assert_equal, assert_matches, in_float64, run_with_gradients

B, H = 3, 2
CASES = (
    Case("one", L=1, D=64),
    Case("of_one_number", L=1, D=1),
    Case("a_few", L=5, D=16),
    Case("odd_width", L=9, D=13),
    Case("above_a_block", L=65, D=32),
    Case("prime", L=101, D=16),
    Case("several_chunks", L=400, D=16),
    Case("widest", L=20, D=256),
    Case("too_wide", L=4, D=257),
    Case("empty", L=0, D=16),
)
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_order = pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "batch_second"])


def make(length: int, width: int, batch_first: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (B, length) if batch_first else (length, B)
    return normal(*shape, 3 * H * width, dtype=dtype)


def in_parts(qkv: Tensor, *, causal=False, weights=None, batch_first=True, dropout_p=0.0, seed=None):
    """The same in attention's own functions."""
    x = qkv if batch_first else qkv.transpose(0, 1)
    q, k, v = (part.unflatten(2, (H, -1)).transpose(1, 2) for part in x.chunk(3, dim=2))
    masks = {"causal": "top_left" if causal else False, "dropout_p": dropout_p, "seed": seed}
    out, lse = attention_with_lse(q, k, v, **masks)
    out = out.transpose(1, 2).flatten(2)
    out = out if batch_first else out.transpose(0, 1)
    if weights is None:
        return (out,)
    each = attention_weights(q, k, lse, **masks)
    return out, each if weights == "each" else each.mean(1)


def given(results) -> tuple:
    return tuple(x for x in results if x is not None)


def at_once(qkv: Tensor, **options):
    return given(self_attention(qkv, H, **options))


@pytest.fixture
def shortcut(monkeypatch) -> list[bool]:
    """Whether each call of self_attention took it."""
    taken, takes = [], together.takes

    def watched(*args):
        taken.append(takes(*args))
        return taken[-1]

    monkeypatch.setattr(together, "takes", watched)
    return taken


@pytest.mark.every_isa("f32", "mean")
@every_case
@every_order
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights", [None, "each", "mean"])
def test_matches_the_reference(case, batch_first, dtype, causal, weights):
    options = {"causal": causal, "weights": weights, "batch_first": batch_first}
    tensors = {"qkv": make(case["L"], case["D"], batch_first, dtype)}
    got = run_with_gradients(at_once, tensors, rounded_to=dtype, **options)
    with use_backend("reference"):
        exact = run_with_gradients(in_parts, in_float64(tensors), rounded_to=dtype, **options)
        naive = run_with_gradients(in_parts, tensors, rounded_to=dtype, **options)
    # With weights the gradient is the sum of two, each with an error of its own. And torch's product has about half the
    # error of others on some processors.
    assert_matches(got, exact, naive, factor=3.0 if weights is None else 4.0)


@every_case
@every_order
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_has_the_bits_of_attention_with_gradients_and_without(case, batch_first, dtype, dropout_p, shortcut):
    tensors = {"qkv": make(case["L"], case["D"], batch_first, dtype)}
    options = {"causal": True, "batch_first": batch_first, "dropout_p": dropout_p, "seed": torch.tensor([7])}
    got = run_with_gradients(at_once, tensors, **options)
    assert_equal(got, run_with_gradients(in_parts, tensors, **options))
    both = run_with_gradients(at_once, tensors, weights="each", **options)
    expected = run_with_gradients(in_parts, tensors, weights="each", **options)
    for name in ("out", "out1"):
        assert_equal(both[name], expected[name])
    with torch.no_grad():
        assert_equal(at_once(weights="each", **tensors, **options), (both["out"], both["out1"]))
    fits = case["L"] > 0 and case["D"] <= 256
    trains = fits and dtype == torch.float32 and case["D"] % 16 == 0
    assert shortcut == [trains, trains, fits]


@pytest.mark.parametrize("weights", ["each", "mean"])
def test_gradients_of_the_weights_alone(weights):
    def alone(function):
        return lambda qkv: function(qkv, weights=weights)[1]

    tensors = {"qkv": make(9, 16)}
    got = run_with_gradients(alone(at_once), tensors)
    with use_backend("reference"):
        exact = run_with_gradients(alone(in_parts), in_float64(tensors), rounded_to=torch.float32)
        naive = run_with_gradients(alone(in_parts), tensors)
    assert_matches(got, exact, naive)


def test_infinities_of_later_tokens_reach_no_earlier_one():
    qkv = make(70, 16)
    qkv[:, 40:] = torch.nan
    out, weights = self_attention(qkv, H, causal=True, weights="mean")
    assert out[:, :40].isfinite().all() and weights[:, :40].isfinite().all()
    assert not weights[:, :40, 40:].any()


def test_tensors_that_it_does_not_read_where_they_lie_go_the_long_way(shortcut):
    dense = make(6, 16)
    spread = torch.stack([dense, torch.full_like(dense, torch.nan)], -1)[..., 0]
    expected = self_attention(dense, H)[0]
    assert_equal(self_attention(spread, H)[0], expected)
    torch.testing.assert_close(self_attention(dense.double(), H)[0].float(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert self_attention(dense, H)[0].dtype == torch.bfloat16
    assert shortcut == [True, False, False, False]


def test_who_forces_a_backend_or_looks_on_is_heeded(shortcut):
    qkv, seen = make(6, 16), []
    with observe(lambda op, backend, _args: seen.append((op.name, backend))):
        self_attention(qkv, H, weights="each")
        with use_backend("reference"):
            self_attention(qkv, H)
    assert seen == [("attention", "cpu")] * 2 + [("attention", "reference")]
    with use_backend("triton"), pytest.raises(NotImplementedError, match="triton"):
        self_attention(qkv.double(), H)
    assert shortcut == []


def test_dropout_follows_torchs_generator():
    def draw():
        torch.manual_seed(3)
        return self_attention(qkv, H, dropout_p=0.5)[0]

    qkv = make(9, 16)
    first = draw()
    assert not torch.equal(first, self_attention(qkv, H, dropout_p=0.5)[0])
    assert_equal(draw(), first)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_second_and_forward_derivatives_are_errors():
    qkv = make(4, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(self_attention(qkv, H)[0].sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        self_attention(forward_ad.make_dual(qkv.detach(), torch.ones_like(qkv)), H)


def test_changing_qkv_before_backward_is_an_error():
    leaf = make(4, 16).requires_grad_()
    qkv = leaf * 1
    out, _ = self_attention(qkv, H)
    qkv.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        (torch.zeros(4, 96), {}, r"qkv must be \(B, L, 3 \* 2 \* D\), got \(4, 96\)"),
        (torch.zeros(2, 4, 97), {}, r"got \(2, 4, 97\)"),
        (torch.zeros(2, 4, 96, dtype=torch.int64), {}, "q must be float32"),
        (torch.zeros(2, 4, 96), {"weights": "all"}, 'weights must be "each", "mean" or None'),
        (torch.zeros(2, 4, 96), {"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
        (torch.zeros(2, 4, 96), {"dropout_p": 0.5, "seed": torch.zeros(2)}, "seed must be"),
    ],
)
def test_wrong_arguments_are_errors(qkv, options, message):
    with pytest.raises(ValueError, match=message):
        self_attention(qkv, H, **options)
    with pytest.raises(ValueError, match="3 \\* 0"):
        self_attention(qkv, 0)


def test_a_batch_of_none():
    qkv = torch.zeros(0, 4, 96)
    out, weights = self_attention(qkv, H, weights="mean")
    assert out.shape == (0, 4, 32) and weights.shape == (0, 4, 4)
    assert attention(*together.thirds(qkv, H, True)).shape == (0, 2, 4, 16)
