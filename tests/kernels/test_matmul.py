"""The products of training: every layout of the operands, sums against float64, gradients, and who is left to torch."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_transformer import MultiheadAttention
from fused_transformer.feed_forward import FeedForward
from fused_transformer.kernels import _native, matmul, use_backend
from fused_transformer.products import applied, linear
from tests.inputs import FLOATS, dtype_id, normal
from tests.oracle import assert_equal, assert_matches

pytestmark = pytest.mark.every_isa

SIZES = [
    (1, 1, 1),
    (5, 3, 2),
    (6, 64, 16),
    (97, 65, 17),
    (100, 127, 257),
    (300, 200, 33),
    (48, 70, 2051),  # more than a slab of K
    (200, 16, 1030),
    (7, 1000, 40),
    (1000, 7, 513),
]
LAYOUTS = ["rows", "columns", "apart", "columns apart", "neither"]
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def own(monkeypatch):
    if not _native.available():
        pytest.skip("this needs the compiled extension")
    monkeypatch.setattr(matmul, "QUICKER", frozenset(FLOATS))


def laid(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with this layout; what lies between its numbers is NaN."""
    if layout == "rows":
        return x.contiguous()
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "columns apart":
        return laid(x.t(), "apart").t()
    wide = torch.full((x.shape[0], 2 * x.shape[1] + 3), torch.nan, dtype=x.dtype)
    out = wide[:, 2 : 2 + x.shape[1]] if layout == "apart" else wide[:, 1 : 1 + 2 * x.shape[1] : 2]
    return out.copy_(x)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_a_product_is_as_good_as_torch(sizes, left, right):
    (M, N, K) = sizes
    x, w, bias = normal(M, K), normal(N, K), normal(N)
    exact = x.double() @ w.double().t()
    x, w = laid(x, left), laid(w, right)
    # K of 1 or 2 often comes out exact in torch: there 2 ulp are the bound
    assert_matches(matmul.product(x, w), exact, x @ w.t(), factor=4.0)
    assert_matches(matmul.product(x, w, bias), exact + bias.double(), torch.addmm(bias, x, w.t()), factor=4.0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("left, right", [("rows", "rows"), ("columns", "columns"), ("neither", "apart")])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=dtype_id)
def test_a_product_of_16_bits_is_rounded_once(dtype, left, right, sizes):
    (M, N, K) = sizes
    x, w, bias = (normal(*shape, dtype=dtype) for shape in ((M, K), (N, K), (N,)))
    exact = x.double() @ w.double().t() + bias.double()
    x, w = laid(x, left), laid(w, right)
    in_float32 = matmul.product(x.float(), w.float(), bias.float())
    if K <= 1024:
        assert_equal(matmul.product(x, w, bias), in_float32.to(dtype))
    else:  # rows of float32 are not copied, and added in slabs of another length
        assert_matches(matmul.product(x, w, bias), exact, in_float32.to(dtype), factor=1.0, ulps=1.0)
    before = normal(M, N)
    added = matmul.product(x, w, out=before.clone(), add=True)
    assert_matches(added, exact - bias.double() + before.double(), in_float32 - bias.float() + before, factor=4.0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("left", ["rows", "columns"])
def test_a_product_is_added_or_written_where_it_is_wanted(sizes, left):
    (M, N, K) = sizes
    x, w, before = laid(normal(M, K), left), normal(N, K), normal(M, N)
    wide = torch.full((M, N + 9), 7.0)
    out = wide[:, 4 : 4 + N]
    assert matmul.product(x, w, out=out) is out
    assert_equal(out.clone(), matmul.product(x, w))
    matmul.product(x, w, out=out.copy_(before), add=True)
    assert_matches(
        out.clone(), before.double() + x.double() @ w.double().t(), torch.addmm(before, x, w.t()), factor=4.0
    )
    assert (wide[:, :4] == 7).all() and (wide[:, 4 + N :] == 7).all()


def test_a_bias_may_lie_apart():
    x, w, bias = normal(50, 40), normal(90, 40), normal(90)
    assert_equal(matmul.product(x, w, bias[:, None].repeat(1, 3)[:, 1]), matmul.product(x, w, bias))


@pytest.mark.parametrize("M, N, K", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_matrices(M, N, K):
    x, w = torch.ones(M, K), torch.ones(N, K)
    assert_equal(matmul.product(x, w), x @ w.t())
    assert_equal(matmul.product(x, w, torch.ones(N)), x @ w.t() + 1)
    assert_equal(matmul.product(x, w, out=torch.ones(M, N), add=True), x @ w.t() + 1)


@pytest.mark.parametrize("K", [700, 2100])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(dtype, K):
    x, w = normal(300, K, dtype=dtype), normal(130, K, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            all_rows = matmul.product(x, w)
            for first, last in ((0, 1), (5, 11), (17, 300)):
                assert_equal(matmul.product(x[first:last], w), all_rows[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype):
    x, w = normal(70, 50, dtype=dtype), normal(90, 50, dtype=dtype)
    x[3, 7], w[8, 2], w[9, 4] = torch.nan, torch.inf, torch.nan
    for left, right in ((x, w), (laid(x, "columns"), laid(w, "columns"))):
        y = matmul.product(left, right)
        assert_equal(y.isnan(), (x @ w.t()).isnan())
        assert_equal(y.isinf(), (x @ w.t()).isinf())


@pytest.mark.parametrize("shape", [(300,), (3, 100), (2, 3, 50)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("under", FLOATS, ids=dtype_id)
def test_linear_has_the_gradients_of_torch(under, shape, has_bias):
    x, weight, dy = (normal(*size, dtype=under) for size in ((*shape, 96), (128, 96), (*shape, 128)))
    bias = normal(128, dtype=under) if has_bias else None
    assert matmul.takes(x, weight, bias)

    def results(function, dtype):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        y.backward(dy.to(dtype))
        return {"y": y.detach()} | {f"d{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf is not None}

    assert_matches(results(linear, under), results(F.linear, torch.float64), results(F.linear, under), factor=4.0)


@pytest.mark.parametrize("lower", SIXTEEN_BITS, ids=dtype_id)
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_is_torchs_in_autocast(has_bias, lower):
    x, weight, dy = normal(2, 50, 96), normal(128, 96).to(lower), normal(2, 50, 128).to(lower)
    bias = normal(128) if has_bias else None

    def results(function):
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", dtype=lower):
            assert function is F.linear or matmul.takes(*leaves)
            y = function(*leaves)
        y.backward(dy)
        return {"y": y.detach()} | {f"d{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf is not None}

    ours, torchs = results(linear), results(F.linear)
    assert all(ours[name].dtype == torchs[name].dtype for name in torchs) and ours["y"].dtype == lower
    for name, of_torch in torchs.items():
        within = 2 * torch.finfo(lower).eps * float(of_torch.abs().max())
        torch.testing.assert_close(ours[name], of_torch, rtol=0, atol=within)


def test_gradients_may_be_expanded_and_taken_again():
    x, weight = normal(200, 96).requires_grad_(), normal(128, 96).requires_grad_()
    first, second = (
        torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        for function in (linear, F.linear)
    )
    again = [torch.autograd.grad(sum(g.sum() for g in grads), (x, weight)) for grads in (first, second)]
    for one, other in zip((*first, *again[0]), (*second, *again[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.detach().abs().max()))
    linear(x, weight).sum().backward()  # a gradient of strides 0
    torch.testing.assert_close(x.grad, weight.sum(0).expand(200, 96))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_the_result_may_be_written_into(dtype):
    x, weight, bias = (normal(*shape, dtype=dtype).requires_grad_() for shape in ((300, 96), (96, 96), (96,)))
    for leaf, size in ((x, (300, 96)), (x.detach().view(3, 100, 96).requires_grad_(), (3, 100, 96))):
        y = linear(leaf, weight, bias)
        y += leaf
        y.mul_(2).sum().backward()
        once = torch.full(size, 2.0, dtype=dtype)
        expected = once + once.view(-1, 96).float().mm(weight.detach().float()).to(dtype).view(size)
        torch.testing.assert_close(leaf.grad, expected, rtol=0.02, atol=0.02)


def test_batches_of_gradients():
    x, weight, grads = normal(200, 96).requires_grad_(), normal(128, 96), normal(3, 200, 128)
    assert matmul.takes(x, weight, None)
    (ours,), (torchs,) = (
        torch.autograd.grad(function(x, weight), x, grads, is_grads_batched=True) for function in (linear, F.linear)
    )
    torch.testing.assert_close(ours, torchs)


def test_what_is_negative_lazily():
    x, weight = normal(300, 96), normal(128, 96)
    bias = normal(128)
    negative = [torch._neg_view(t) for t in (x, weight, bias)]
    torch.testing.assert_close(linear(*negative), F.linear(*negative), rtol=1e-4, atol=1e-4)
    leaf = x.clone().requires_grad_()
    linear(leaf, weight).backward(torch._neg_view(torch.ones(300, 128)))
    torch.testing.assert_close(leaf.grad, -weight.sum(0).expand(300, 96), rtol=1e-4, atol=1e-4)


def test_a_product_of_two_dtypes_is_an_error():
    x, w = normal(20, 30), normal(40, 30)
    with pytest.raises(ValueError, match="one dtype"):
        matmul.product(x, w.bfloat16())
    with pytest.raises(ValueError, match="a sum float32"):
        matmul.product(x.bfloat16(), w.bfloat16(), out=torch.zeros(20, 40, dtype=torch.bfloat16), add=True)


def test_what_is_left_to_torch():
    x, weight, bias = normal(300, 96), normal(128, 96), normal(128)
    assert matmul.takes(x, weight, bias) and matmul.takes(x, weight, None)
    assert not matmul.takes(x[:9], weight, bias)  # too small
    assert not matmul.takes(x[:, :95], weight, bias)  # torch has the error
    assert not matmul.takes(x.double(), weight.double(), None)
    assert matmul.takes(x.bfloat16(), weight.bfloat16(), None)
    assert not matmul.takes(x.bfloat16(), weight, None)  # torch has the error
    assert not matmul.takes(x.to("meta"), weight.to("meta"), None)
    assert not matmul.takes(x, weight[0, 0], None)  # torch has the error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, torch says
        assert not matmul.takes(torch.nested.nested_tensor([x, x[:50]]), weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.takes(x, weight, bias)
        assert not matmul.takes(x.double(), weight, bias)
    with torch.autograd.forward_ad.dual_level():
        assert not matmul.takes(x, weight, bias)
    per_row = torch.func.vmap(lambda row: linear(row, weight, bias))(x.view(3, 100, 96))
    torch.testing.assert_close(per_row, F.linear(x, weight, bias).view(3, 100, 128))


def test_autocast_of_a_dtype_that_torch_multiplies_well_is_torchs(monkeypatch):
    x, weight, bias = normal(300, 96), normal(128, 96), normal(128)
    monkeypatch.setattr(matmul, "QUICKER", frozenset({torch.float32, torch.float16}))
    assert matmul.takes(x, weight, bias) and not matmul.takes(x.bfloat16(), weight.bfloat16(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not matmul.takes(x, weight, bias)
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_float32_of_few_rows_and_many_weights_alone(monkeypatch):
    monkeypatch.setattr(matmul, "QUICKER", frozenset())
    monkeypatch.setattr(matmul, "QUICKER_FOR_FEW", True)
    monkeypatch.setattr(matmul, "MANY_WEIGHTS", 96 * 128)
    weight, bias = normal(128, 96), normal(128)
    taken = [rows for rows in (1, 3, 4, 256, 257) if matmul.takes(normal(rows, 96), weight, bias)]
    assert taken == [4, 256] and matmul.takes(normal(2, 100, 96), weight, bias)
    assert not matmul.takes(normal(16, 96), weight[1:], None)
    assert not matmul.takes(normal(16, 96).bfloat16(), weight.bfloat16(), None)
    assert not matmul.takes(normal(16, 0), weight[:, :0], None)
    x, dy = normal(16, 96), normal(16, 128)
    ours, torchs = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    assert matmul.takes(*ours)
    y, expected = linear(*ours), F.linear(*torchs)
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, torchs, dy), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("supported", [True, False])
def test_in_16_bits_onednn_is_asked(supported, monkeypatch):
    if _native.library().isa() == "baseline":
        pytest.skip("ours is for processors with AVX2")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: not supported)
    assert (torch.bfloat16 in matmul._quicker("")) == (not supported)
    assert (torch.float16 in matmul._quicker("")) == supported


def test_a_module_that_somebody_changed_is_called():
    x, module = normal(300, 96), nn.Linear(96, 128)
    torch.testing.assert_close(applied(module, x), module(x))
    handle = module.register_forward_hook(lambda *_: torch.zeros(()))
    assert applied(module, x).dim() == 0
    handle.remove()
    nn.utils.parametrizations.weight_norm(module)
    torch.testing.assert_close(applied(module, x), module(x))


@pytest.mark.parametrize("make", [lambda: FeedForward(64, 256), lambda: MultiheadAttention(64, 4, batch_first=True)])
def test_modules_train_the_same_either_way(make, monkeypatch):
    torch.manual_seed(0)
    module, x = make(), normal(4, 200, 64)

    def gradients():
        module.zero_grad()
        y = module(x) if isinstance(module, FeedForward) else module(x, x, x, need_weights=False)[0]
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters())]

    ours = gradients()
    monkeypatch.setattr(matmul, "QUICKER", frozenset())
    for one, other in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


def test_compiled_modules_do_not_see_it():
    module, x = FeedForward(64, 256), normal(300, 64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(("setting", "expected"), [("own", 3), ("torch", 0)])
def test_the_setting_overrules_the_processor(setting, expected):
    assert len(matmul._quicker(setting)) == expected


def test_a_setting_that_says_nothing_is_an_error_at_the_import():
    environment = {"FUSED_TRANSFORMER_MATMUL": "mkl"}
    command = [sys.executable, "-c", "import fused_transformer.kernels.matmul"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "FUSED_TRANSFORMER_MATMUL must be own or torch, got mkl" in done.stderr
