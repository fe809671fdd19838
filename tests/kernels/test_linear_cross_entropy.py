"""linear_cross_entropy on every backend, its chunks against all the logits at once, and what it saves of memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import cross_entropy, linear_cross_entropy, matmul, use_backend
from fused_transformer.kernels.linear_cross_entropy import has_kernel, op
from tests.inputs import FLOATS, LAYOUTS, Case, case_id, dtype_id, normal, running_on
from tests.memory import peak_bytes
from tests.oracle import assert_backend_matches, assert_equal, assert_matches, in_float64, run_with_gradients

BACKENDS = op.order
REDUCTIONS = ("mean", "sum", "none")
CASES = (
    Case("one", tokens=1, width=1, vocabulary=1),
    Case("one_chunk", tokens=8, width=5, vocabulary=40),
    Case("two_chunks", tokens=9, width=5, vocabulary=40),
    Case("prime", tokens=53, width=7, vocabulary=101),
    Case("wide", tokens=41, width=24, vocabulary=3),
    Case("long_rows", tokens=19, width=8, vocabulary=5001),
    Case("none", tokens=0, width=5, vocabulary=40),
)
OPTIONS = {
    "plain": {},
    "uniform": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "smoothing": "others", "z_loss": 0.01, "ignore_index": 3},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 8 tokens, or of as many as a row of weight has bytes by four: else these tensors are one chunk."""
    monkeypatch.setattr(op.module("cpu"), "CHUNK_BYTES", 0)
    monkeypatch.setattr(op.module("cpu"), "CHUNK_ROWS", 8)


def make(tokens, width, vocabulary, dtype=torch.float32, *, bias=True):
    """Random tensors; every fifth target is ignored."""
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::5] = -100
    return {
        "hidden": normal(tokens, width, dtype=dtype),
        "weight": normal(vocabulary, width, dtype=dtype, std=0.5),
        "bias": normal(vocabulary, dtype=dtype) if bias else None,
        "targets": targets,
    }


def torchs(hidden, weight, bias, targets, **options):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, **options)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, case, dtype, reduction):
    tensors = make(**case, dtype=dtype)
    got = assert_backend_matches(
        linear_cross_entropy, backend, tensors, label_smoothing=0.1, reduction=reduction, ignore_index=-100
    )
    assert got["out"].dtype == torch.float32 and got["dweight"].dtype == dtype


@pytest.mark.parametrize("quicker", [frozenset(FLOATS), frozenset()], ids=["own", "torchs"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_matches_the_reference_by_either_products(case, dtype, quicker, monkeypatch):
    monkeypatch.setattr(matmul, "QUICKER", quicker)  # whatever is the quicker here
    monkeypatch.setattr(matmul, "LEAST_ROWS", dict.fromkeys(FLOATS, 1))
    assert_backend_matches(linear_cross_entropy, "cpu", make(**case, dtype=dtype), label_smoothing=0.1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_each_option_present_and_absent(dtype, options, reduction, bias):
    tensors = make(37, 6, 50, dtype, bias=bias)
    tensors["targets"][1::5] = OPTIONS[options].get("ignore_index", -100)
    assert_backend_matches(linear_cross_entropy, "cpu", tensors, reduction=reduction, **OPTIONS[options])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_reference_is_torchs(label_smoothing, reduction):
    tensors, options = in_float64(make(29, 7, 31)), {"label_smoothing": label_smoothing, "reduction": reduction}
    with use_backend("reference"):
        got = run_with_gradients(linear_cross_entropy, tensors, **options)
    torch.testing.assert_close(got, run_with_gradients(torchs, tensors, **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, bias, targets = in_float64(make(6, 4, 7)).values()
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": reduction}
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *xs: linear_cross_entropy(*xs, targets, **options), leaves)


def test_errors_are_at_most_twice_those_of_plain_torch_over_many_chunks():
    """512 tokens in 8 chunks: the sums over tokens are taken in another order than torch's."""
    tensors = make(512, 64, 1000)
    exact = run_with_gradients(torchs, in_float64(tensors), rounded_to=torch.float32, label_smoothing=0.1)
    plain = run_with_gradients(torchs, tensors, label_smoothing=0.1)
    with running_on("cpu"):
        got = run_with_gradients(linear_cross_entropy, tensors, label_smoothing=0.1)
    assert_matches(got["out"], exact["out"], plain["out"])
    gradients = [{name: x for name, x in results.items() if name != "out"} for results in (got, exact, plain)]
    assert_matches(*gradients, ulps=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_any_strides(dtype, layout):
    tensors = make(20, 6, 30, dtype)
    tensors |= {name: LAYOUTS[layout](tensors[name]) for name in ("hidden", "weight")}
    tensors["bias"] = tensors["bias"][:, None].repeat(1, 3)[:, 1]
    # rows of weight that are all one leave a gradient of 0 to hidden: what is compared is rounding
    judge = partial(assert_matches, factor=4.0) if layout == "expanded" else None
    assert_backend_matches(linear_cross_entropy, "cpu", tensors, judge=judge)


@pytest.mark.parametrize("bias", [True, False])
def test_nan_between_rows_stays_there(bias, monkeypatch):
    """As it does not in torch.mm, from so many rows on, on a processor with AMX."""
    monkeypatch.setattr(op.module("cpu"), "CHUNK_BYTES", 2**24)
    tensors = make(33, 5, 64, torch.bfloat16, bias=bias)
    tensors |= {name: LAYOUTS["strided"](tensors[name]) for name in ("hidden", "weight")}
    got = assert_backend_matches(linear_cross_entropy, "cpu", tensors)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (3, 1, 4)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape_and_both_integers(backend, reduction, shape):
    for dtype in (torch.int32, torch.int64):
        tensors = make(0, 6, 24) | {"hidden": normal(*shape, 6), "targets": torch.randint(0, 24, shape, dtype=dtype)}
        got = assert_backend_matches(linear_cross_entropy, backend, tensors, reduction=reduction)
        assert got["out"].shape == (shape if reduction == "none" else ())
        assert got["dhidden"].shape == (*shape, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_token_that_counts_the_mean_is_nan_and_the_gradients_0(backend):
    tensors = make(20, 6, 30)
    tensors["targets"].fill_(-100)
    with running_on(backend):
        mean = run_with_gradients(linear_cross_entropy, tensors)
        total = run_with_gradients(linear_cross_entropy, tensors, reduction="sum")
    assert mean["out"].isnan() and total["out"] == 0
    for name in ("dhidden", "dweight", "dbias"):
        assert not mean[name].nan_to_num().any() and not total[name].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_the_same_call_twice_is_bitwise_equal(dtype):
    tensors = make(53, 16, 301, dtype)
    first, second = (run_with_gradients(linear_cross_entropy, tensors) for _ in range(2))
    assert_equal(first, second)


def test_a_gradient_of_float16_survives_the_mean_over_many_tokens():
    """The loss is scaled ahead of the backward pass; a gradient computed by the forward pass would be 0 by then."""
    tensors = make(500, 8, 600, torch.float16)
    leaves = {name: tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    exact = run_with_gradients(torchs, in_float64(tensors))
    with running_on("cpu"):
        loss = linear_cross_entropy(**tensors) * 2.0**14
    for (name, leaf), got in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        upstream = torch.randn((), generator=torch.Generator().manual_seed(20170612), dtype=torch.float64)
        expected = exact["d" + name] / upstream * 2.0**14
        assert (got.double() - expected).norm() < 0.01 * expected.norm(), name
        assert leaf.grad is None


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_is_the_one_computed_among_all(backend, reduction, name):
    tensors = make(30, 6, 40)
    leaves = tensors | {n: tensors[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
    alone = tensors | {name: tensors[name].clone().requires_grad_()}
    upstream = normal(30) if reduction == "none" else normal()
    with running_on(backend):
        together = torch.autograd.grad(linear_cross_entropy(**leaves, reduction=reduction), leaves[name], upstream)
        gradient = torch.autograd.grad(linear_cross_entropy(**alone, reduction=reduction), alone[name], upstream)
    assert_equal(gradient, together)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_pass_through_a_kept_graph_gives_the_same(reduction):
    tensors = make(30, 6, 40)
    weight = tensors["weight"].requires_grad_()
    loss = linear_cross_entropy(**tensors, reduction=reduction).sum()
    first, second = (torch.autograd.grad(3 * loss, weight, retain_graph=True) for _ in range(2))
    assert_equal(first, second)
    weight.grad = None
    loss.backward()
    torch.testing.assert_close(3 * weight.grad, first[0])


def test_the_loss_is_the_same_with_and_without_a_gradient_to_come():
    tensors = make(30, 6, 40)
    for reduction in REDUCTIONS:
        plain = linear_cross_entropy(**tensors, reduction=reduction)
        trained = linear_cross_entropy(
            **tensors | {"weight": tensors["weight"].clone().requires_grad_()}, reduction=reduction
        )
        assert trained.requires_grad and not plain.requires_grad
        torch.testing.assert_close(trained.detach(), plain)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    tensors = make(10, 6, 40)
    hidden = tensors["hidden"].requires_grad_()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(**tensors, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (loss + gradient.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_a_forward_mode_derivative_is_an_error_and_not_a_wrong_number():
    tensors = make(10, 6, 40)
    with torch.autograd.forward_ad.dual_level():
        tensors["hidden"] = torch.autograd.forward_ad.make_dual(tensors["hidden"], torch.ones(10, 6))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            linear_cross_entropy(**tensors)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_all_there(reduction, monkeypatch):
    tokens, width, vocabulary = 512, 16, 4000
    tensors = make(tokens, width, vocabulary)
    for name in ("hidden", "weight", "bias"):
        tensors[name].requires_grad_()
    logits = tokens * vocabulary * 4
    monkeypatch.setattr(op.module("cpu"), "CHUNK_ROWS", 64)
    assert peak_bytes(lambda: torchs(**tensors, reduction=reduction).sum().backward()) > 2 * logits
    ours = peak_bytes(lambda: linear_cross_entropy(**tensors, reduction=reduction).sum().backward())
    assert logits / 8 < ours < logits / 4


# ---------------------------------------------------------------- autocast, compilers


def test_autocast_takes_products_in_its_dtype_and_gives_gradients_in_the_tensors_own():
    tensors = make(40, 8, 100)

    def under_autocast(function):
        def run(**given):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(**given).float()

        return run

    exact = run_with_gradients(torchs, in_float64(tensors), rounded_to=torch.float32)
    plain = run_with_gradients(under_autocast(torchs), tensors)
    got = run_with_gradients(under_autocast(linear_cross_entropy), tensors)
    assert_matches(got, exact, plain)
    assert not torch.equal(got["dweight"], got["dweight"].bfloat16().float())  # summed and kept in float32
    mixed = tensors | {"hidden": tensors["hidden"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(linear_cross_entropy(**mixed), got["out"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_one_node_with_eagers_numbers(backend, reduction):
    tensors = make(30, 6, 40)

    def function(hidden, **rest):
        return linear_cross_entropy(hidden * 2, reduction=reduction, label_smoothing=0.1, **rest) + 1

    with running_on(backend):
        eager = run_with_gradients(function, tensors)
        compiled = run_with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("lowered", [None, torch.bfloat16], ids=str)
def test_the_operator_keeps_torchs_rules(lowered, bias):
    hidden, weight, bias, targets = make(12, 6, 40, bias=bias).values()
    options = (lowered, 0.1, "others", 0.01, -100)
    leaves = [x if x is None else x.requires_grad_() for x in (hidden.view(3, 4, 6), weight, bias)]
    arguments = (*leaves, targets.view(3, 4), *options)
    torch.library.opcheck(torch.ops.fused_transformer.linear_cross_entropy.default, arguments)
    tensors = [x if x is None else x.detach() for x in leaves]
    arguments = (normal(3, 4), *tensors, targets.view(3, 4), *options, True, False, bias is not None)
    torch.library.opcheck(torch.ops.fused_transformer.linear_cross_entropy_backward.default, arguments)


def test_flops_are_counted():
    tensors = make(30, 6, 40)
    tensors["hidden"].requires_grad_()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        linear_cross_entropy(**tensors).backward()
    assert counter.get_total_flops() == (1 + 3) * 2 * 30 * 6 * 40  # the logits twice, and the gradients


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"hidden must be \(..., E\) and targets \(...\), got shapes \(11, 6\) and \(4,\)",
         {"targets": torch.ones(4).long()}),
        (r"weight must be \(V, 6\) with V >= 1, got \(40, 5\)", {"weight": torch.ones(40, 5)}),
        (r"weight must be \(V, 6\) with V >= 1, got \(0, 6\)", {"weight": torch.ones(0, 6)}),
        (r"bias must have shape \(40,\), got \(41,\)", {"bias": torch.ones(41)}),
        (r"same dtype, got hidden: float32, weight: float16, bias: float32", {"weight": torch.ones(40, 6).half()}),
        (r"same device, got hidden: cpu, weight: cpu, bias: cpu, targets: meta",
         {"targets": torch.ones(11, device="meta").long()}),
        (r"hidden must be float32, float16, bfloat16 or float64, got int64", {"hidden": torch.ones(11, 6).long()}),
        (r"targets must be int32 or int64, got float32", {"targets": torch.ones(11)}),
        (r"label_smoothing must be between 0 and 1, got 1.1", {"label_smoothing": 1.1}),
        (r"z_loss must be at least 0, got -1", {"z_loss": -1.0}),
        (r"reduction must be one of 'mean', 'sum', 'none', got 'max'", {"reduction": "max"}),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**make(11, 6, 40), **change})


def test_what_is_no_tensor_is_a_type_error():
    for name in ("hidden", "weight", "targets"):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
            linear_cross_entropy(**make(11, 6, 40) | {name: [1.0]})


def test_a_target_outside_the_vocabulary_is_an_index_error_that_names_it():
    tensors = make(11, 6, 40)
    tensors["targets"][3] = 40
    with pytest.raises(IndexError, match=r"targets holds 40 at index \[3\], outside the vocabulary of 40"):
        linear_cross_entropy(**tensors)


def test_float64_is_for_the_reference_alone():
    tensors = in_float64(make(11, 6, 40))
    torch.testing.assert_close(linear_cross_entropy(**tensors), torchs(**tensors))
    assert not has_kernel(tensors["hidden"], tensors["weight"])
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="hidden must be float32, float16 or bfloat16"):
        linear_cross_entropy(**tensors)


def test_it_is_cross_entropy_of_the_linear_layer():
    tensors = make(11, 6, 40)
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    for options in OPTIONS.values():
        expected = cross_entropy(logits, tensors["targets"].where(tensors["targets"] >= 0, 3), **options)
        got = linear_cross_entropy(
            **tensors | {"targets": tensors["targets"].where(tensors["targets"] >= 0, 3)}, **options
        )
        torch.testing.assert_close(got, expected)
