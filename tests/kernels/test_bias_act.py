"""Bias, activation and dropout on every backend, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import _philox, bias_act, use_backend
from fused_transformer.kernels.bias_act import ACTIVATIONS, op
from tests.inputs import (
    FLOATS,
    LAYOUTS,
    ROW_CASES,
    Case,
    case_id,
    dtype_id,
    normal,
    running_on,
    threads,
)
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

BACKENDS = op.order
CASES = (
    *ROW_CASES,
    Case("three_columns", rows=4, cols=3, mean=0.0),
    Case("below_a_strip", rows=9, cols=1023, mean=0.0),
    Case("strip", rows=9, cols=1024, mean=0.0),
    Case("above_a_strip", rows=9, cols=1025, mean=0.0),
    Case("feed_forward", rows=70, cols=2048, mean=0.0),
    Case("far_below_zero", rows=9, cols=40, mean=-1000.0),
)


def make(rows, cols, dtype=torch.float32, *, device="cpu", mean=0.0, bias_dtype=None, bias=True):
    x = normal(rows, cols, dtype=dtype, device=device, mean=mean, std=2.0)
    return {"x": x, "bias": normal(cols, dtype=bias_dtype or dtype, device=device) if bias else None}


def new_seed(device="cpu"):
    return torch.tensor([-(2**40) - 4711], device=device)


def run_with_gradients_on(backend, tensors, **options):
    with running_on(backend):
        return run_with_gradients(bias_act, tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, activation, case, dtype, device):
    tensors = make(case["rows"], case["cols"], dtype, device=device, mean=case["mean"])
    got = assert_backend_matches(bias_act, backend, tensors, activation=activation)
    assert got["out"].dtype == dtype and got["out"].is_contiguous()


@pytest.mark.every_isa
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_present_and_absent(backend, dtype, activation, dropout_p, bias, device):
    tensors = make(37, 70, dtype, device=device, bias=bias)
    options = {"dropout_p": dropout_p, "seed": new_seed(device)}
    assert_backend_matches(bias_act, backend, tensors, activation=activation, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_may_be_float32_beside_sixteen_bit_data(backend, dtype, activation, device):
    tensors = make(21, 100, dtype, device=device, bias_dtype=torch.float32)
    got = assert_backend_matches(bias_act, backend, tensors, activation=activation)
    assert got["out"].dtype == dtype and got["dbias"].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, dtype, layout, device):
    for activation in ("relu", "gelu"):
        for cols in (64, 67):
            tensors = make(12, cols, dtype, device=device)
            tensors["x"] = LAYOUTS[layout](tensors["x"])
            tensors["bias"] = tensors["bias"][:, None].repeat(1, 3)[:, 1]
            got = assert_backend_matches(bias_act, backend, tensors, activation=activation)
            assert got["out"].is_contiguous()


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (2, 0, 24), (2, 1, 3, 2, 24)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape(backend, shape, device):
    options = {"dropout_p": 0.5, "seed": new_seed(device), "activation": "gelu"}
    tensors = {"x": normal(*shape, device=device), "bias": normal(24, device=device)}
    got = assert_backend_matches(bias_act, backend, tensors, **options)
    assert got["out"].shape == shape
    with running_on(backend):  # rows are numbered over all leading axes, which dropout's bits depend on
        rows = bias_act(tensors["x"].reshape(-1, 24), tensors["bias"], **options)
    assert_equal(got["out"].reshape(-1, 24), rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_axes(backend, device):
    tensors = {"x": normal(6, 5, 7, device=device).permute(2, 1, 0), "bias": normal(6, device=device)}
    for activation in ACTIVATIONS:
        assert_backend_matches(bias_act, backend, tensors, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_output_and_a_gradient_of_zeros(backend, device):
    got = assert_backend_matches(bias_act, backend, make(0, 40, device=device))
    assert got["out"].shape == (0, 40)
    assert_equal(got["dbias"], torch.zeros(40, device=device))


# ---------------------------------------------------------------- dropout


@pytest.mark.every_isa
@pytest.mark.parametrize("cols", [1, 3, 64, 71, 300, 1029])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_philoxs_in_forward_and_backward(backend, dtype, activation, cols, device):
    x = torch.full(
        (23, cols), 60.0, dtype=dtype, device=device, requires_grad=True
    )  # where each activation is h itself
    keep = _philox.keep_rows(new_seed(device), 0.25, 23, cols)
    with running_on(backend):
        y = bias_act(x, activation=activation, dropout_p=0.25, seed=new_seed(device))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_equal(y.detach(), torch.where(keep, 80.0, 0.0).to(dtype))
    assert_equal(dx, torch.where(keep, 1 / 0.75, 0.0).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_may_be_anything(backend, activation, device):
    tensors = make(23, 64, device=device)
    keep = _philox.keep_rows(new_seed(device), 0.5, 23, 64)
    options = {"activation": activation, "dropout_p": 0.5, "seed": new_seed(device)}
    with running_on(backend):
        clean = bias_act(**tensors, **options)
        tensors["x"] = torch.where(keep, tensors["x"], torch.inf)
        assert_equal(bias_act(**tensors, **options), clean)


def test_torchs_generator_governs_the_mask():
    tensors = make(20, 30)
    torch.manual_seed(7)
    first, second = (bias_act(**tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert_equal(bias_act(**tensors, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_the_seed_and_the_generator_do_not_matter():
    tensors = make(20, 30)
    state = torch.get_rng_state()
    assert_equal(bias_act(**tensors, seed=new_seed()), bias_act(**tensors))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- numbers


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_from_far_below_zero_to_far_above(backend, dtype, activation, device):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype).to(device)
    far = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 100.0, -100.0, 6e4, -6e4], device=device).to(dtype)
    assert_backend_matches(bias_act, backend, {"x": torch.cat([x, far])[None]}, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan_and_stays_where_it_is(backend, activation, device):
    tensors = make(5, 20, device=device)
    tensors["x"][1, 3] = torch.nan
    got = run_with_gradients_on(backend, tensors, activation=activation)
    for name in ("out", "dx"):
        assert got[name].isnan().nonzero().tolist() in ([[1, 3]], [])
    assert got["out"][1, 3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_of_infinities(backend, device):
    x = torch.tensor([[torch.inf, -torch.inf, 1.0]], device=device)
    got = run_with_gradients_on(backend, {"x": x})
    assert got["out"].tolist() == [[torch.inf, 0.0, 1.0]] and got["dx"].isfinite().all() and got["dx"][0, 1] == 0.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_twice_is_bitwise_equal(backend, dtype, activation, device):
    tensors = make(101, 130, dtype, device=device)
    options = {"activation": activation, "dropout_p": 0.1, "seed": new_seed(device)}
    with running_on(backend):
        first, second = (run_with_gradients(bias_act, tensors, **options) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])  # torch's own goes by vectors
def test_a_row_does_not_depend_on_the_others(backend, activation, device):
    tensors = make(70, 1300, device=device)
    with running_on(backend):
        together = bias_act(**tensors, activation=activation)
        alone = bias_act(tensors["x"][:3], tensors["bias"], activation=activation)
    assert_equal(alone, together[:3])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_bits_on_any_number_of_threads(activation):
    tensors, options = make(301, 130), {"activation": activation, "dropout_p": 0.1, "seed": new_seed()}
    with threads(1):
        alone = run_with_gradients_on("cpu", tensors, **options)
    with threads(3):
        assert_equal(run_with_gradients_on("cpu", tensors, **options), alone)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_outputs_that_go_past_the_cache_are_the_same(dtype):
    # 4 MiB and more are stored past the cache (csrc/common/stream.h), the rows of a part of them are not
    tensors, dy = make(2080, 1024, dtype), normal(2080, 1024, dtype=dtype)
    results = []
    for rows in (slice(None), slice(1000, 1500)):
        x = tensors["x"][rows].clone().requires_grad_()
        with running_on("cpu"):
            y = bias_act(x, tensors["bias"], activation="gelu")
        results.append({"y": y.detach(), "dx": torch.autograd.grad(y, x, dy[rows])[0]})
    assert_equal({name: t[1000:1500] for name, t in results[0].items()}, results[1])


def test_float64_is_for_the_reference_alone():
    x = normal(3, 8, dtype=torch.float64)
    assert bias_act(x).dtype == torch.float64
    with use_backend("triton"), pytest.raises(NotImplementedError, match="x must be float32, float16 or bfloat16"):
        bias_act(x)
