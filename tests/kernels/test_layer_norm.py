"""Layer norm and its fused forms on every backend, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import (
    add_layer_norm,
    add_layer_norm_with_total,
    add_rms_norm,
    add_rms_norm_with_total,
    layer_norm,
    rms_norm,
    use_backend,
)
from fused_transformer.kernels.layer_norm import op
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

# What each public function takes, in its own order; (..., N) tensors first.
TAKES = {
    layer_norm: ("x", "weight", "bias"),
    rms_norm: ("x", "weight"),
    add_layer_norm: ("x", "residual", "weight", "bias", "x_bias"),
    add_layer_norm_with_total: ("x", "residual", "weight", "bias", "x_bias"),
    add_rms_norm: ("x", "residual", "weight", "x_bias"),
    add_rms_norm_with_total: ("x", "residual", "weight", "x_bias"),
}
FUNCTIONS = tuple(TAKES)
FUSED = tuple(f for f in FUNCTIONS if "residual" in TAKES[f])
BACKENDS = op.order
EDGES = (
    *ROW_CASES,
    Case("three_columns", rows=4, cols=3, mean=0.0),
    Case("held_row", rows=2, cols=16_384, mean=0.0),  # the longest the CPU kernel keeps on the stack
    Case("above_a_held_row", rows=2, cols=16_385, mean=0.0),
    Case("warp_row", rows=9, cols=1024, mean=0.0),  # the longest that one CUDA warp takes
    Case("above_a_warp_row", rows=9, cols=1025, mean=0.0),
    Case("few_rows_a_part", rows=50, cols=40, mean=0.0),
)


def make(function, rows, cols, dtype, *, device="cpu", mean=0.0, param_dtype=None, absent=()):
    """The tensors of `function` by name: (rows, cols) and (cols,), random all of them.

    One column alone holds eighths, whose sums are exact: nearly all of its gradient cancels, and what remains would
    tell by how much the sum was rounded, not whether the gradient is right.
    """
    tensors = {}
    for name in TAKES[function]:
        if name in absent:
            continue
        if name in ("x", "residual"):
            tensors[name] = normal(rows, cols, dtype=dtype, device=device, mean=mean if name == "x" else 0.0)
        else:
            tensors[name] = normal(cols, dtype=param_dtype or dtype, device=device)
        if cols == 1:
            tensors[name] = (tensors[name] * 8).round() / 8
    return tensors


def new_seed(device="cpu"):
    return torch.tensor([-(2**40) - 4711], device=device)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", EDGES, ids=case_id)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, function, case, dtype, device):
    tensors = make(function, case["rows"], case["cols"], dtype, device=device, mean=case["mean"])
    assert_backend_matches(function, backend, tensors)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("cols", [65536, 100_003])
@pytest.mark.parametrize("backend", BACKENDS)
def test_very_wide_rows(backend, cols, dtype, device):
    tensors = make(add_layer_norm_with_total, 2, cols, dtype, device=device)
    assert_backend_matches(add_layer_norm_with_total, backend, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_wide_rows_far_from_zero(backend, device):
    tensors = make(add_layer_norm_with_total, 2, 20_000, torch.float32, device=device, mean=1000.0)
    assert_backend_matches(add_layer_norm_with_total, backend, tensors)


@pytest.mark.every_isa
@pytest.mark.parametrize("cols", [16_384, 20_483])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_dropout_in_rows_that_the_cpu_kernel_sums_in_stretches(cols, dtype):
    tensors = make(add_layer_norm_with_total, 2, cols, dtype)
    got = assert_backend_matches(add_layer_norm_with_total, "cpu", tensors, dropout_p=0.3, seed=new_seed())
    alone = assert_backend_matches(add_layer_norm, "cpu", tensors, dropout_p=0.3, seed=new_seed())
    assert_equal(alone["out"], got["out"])


@pytest.mark.every_isa
@pytest.mark.parametrize("absent", [(), ("weight",), ("bias",), ("weight", "bias"), ("x_bias",)], ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_present_and_absent(backend, dtype, dropout_p, absent, device):
    for function in FUSED:
        tensors = make(function, 37, 70, dtype, device=device, absent=absent)
        seed = new_seed(device) if dropout_p else None
        assert_backend_matches(function, backend, tensors, dropout_p=dropout_p, seed=seed)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_may_be_float32_beside_sixteen_bit_data(backend, dtype, device):
    for function in (layer_norm, add_layer_norm_with_total):
        tensors = make(function, 21, 100, dtype, device=device, param_dtype=torch.float32)
        got = assert_backend_matches(function, backend, tensors)
        assert got["out"].dtype == dtype and got["dweight"].dtype == torch.float32
    for name in ("weight", "bias", "x_bias"):  # one of them alone, and the others as x
        tensors = make(add_layer_norm, 21, 100, dtype, device=device)
        tensors[name] = tensors[name].float()
        assert_backend_matches(add_layer_norm, backend, tensors)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, dtype, layout, device):
    for function in FUNCTIONS:
        for cols in (64, 67):
            tensors = make(function, 12, cols, dtype, device=device)
            given = {name: LAYOUTS[layout](t) if t.dim() == 2 else t for name, t in tensors.items()}
            assert_backend_matches(function, backend, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_parameters(backend, device):
    tensors = make(add_layer_norm, 12, 33, torch.float32, device=device)
    for name in ("weight", "bias", "x_bias"):
        tensors[name] = tensors[name][:, None].repeat(1, 3)[:, 1]
        assert tensors[name].stride() == (3,)
    assert_backend_matches(add_layer_norm, backend, tensors)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (2, 0, 24), (2, 1, 3, 2, 24)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape(backend, shape, device):
    x, residual = normal(*shape, device=device), normal(*shape, device=device)
    parameters = {name: normal(24, device=device) for name in ("weight", "bias", "x_bias")}
    tensors = {"x": x, "residual": residual, **parameters}
    got = assert_backend_matches(add_layer_norm_with_total, backend, tensors, dropout_p=0.5, seed=new_seed(device))
    flat = {name: t.reshape(-1, 24) if name in ("x", "residual") else t for name, t in tensors.items()}
    if x.numel() and len(shape) == 3:  # rows are numbered over all leading axes, which dropout's bits depend on
        with running_on(backend):
            rows = run_with_gradients(add_layer_norm_with_total, flat, dropout_p=0.5, seed=new_seed(device))
        assert_equal(got["out"].reshape(-1, 24), rows["out"])


@pytest.mark.parametrize("permutation", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_axes(backend, permutation, device):
    tensors = {name: normal(6, 5, 7, device=device).permute(permutation) for name in ("x", "residual")}
    tensors["weight"] = normal(tensors["x"].shape[-1], device=device)
    got = assert_backend_matches(add_layer_norm_with_total, backend, tensors)
    assert got["out"].is_contiguous() and got["out"].shape == tensors["x"].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_output_and_zero_parameter_gradients(backend, device):
    tensors = make(add_layer_norm_with_total, 0, 40, torch.float32, device=device)
    got = assert_backend_matches(add_layer_norm_with_total, backend, tensors)
    assert got["out"].shape == (0, 40)
    for name in ("dweight", "dbias", "dx_bias"):
        assert_equal(got[name], torch.zeros(40, device=device))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_twice_is_bitwise_equal(backend, dtype, device):
    tensors = make(add_layer_norm_with_total, 333, 66, dtype, device=device)
    with running_on(backend):
        first, second = (
            run_with_gradients(add_layer_norm_with_total, tensors, dropout_p=0.1, seed=new_seed(device))
            for _ in range(2)
        )
    assert_equal(first, second)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(1000, 96), (5, 20_000)])
def test_the_number_of_threads_changes_no_bit(shape):
    tensors = make(add_layer_norm_with_total, *shape, torch.float32)
    results = []
    for count in (1, 2, 3):
        with running_on("cpu"), threads(count):
            results.append(run_with_gradients(add_layer_norm_with_total, tensors, dropout_p=0.1, seed=new_seed()))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@pytest.mark.parametrize("cols", [512, 1000, 3000])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_row_does_not_depend_on_the_others(backend, dtype, cols, device):
    tensors = make(add_layer_norm_with_total, 70, cols, dtype, device=device)
    with running_on(backend):
        together = run_with_gradients(add_layer_norm_with_total, tensors)
        part = {name: t[:3] if t.dim() == 2 else t for name, t in tensors.items()}
        alone, alone_total = add_layer_norm_with_total(**part)
        assert_equal(alone, together["out"][:3])
        assert_equal(alone_total, together["out1"][:3])


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_outputs_that_go_past_the_cache_are_the_same(dtype):
    # 4 MiB and more are stored past the cache (csrc/common/stream.h), the rows of a part of it are not
    tensors = make(add_layer_norm_with_total, 2080, 1024, dtype)
    part = {name: t[1000:1500] if t.dim() == 2 else t for name, t in tensors.items()}
    dy, dtotal = normal(2080, 1024, dtype=dtype), normal(2080, 1024, dtype=dtype)
    results = []
    for given, rows in ((tensors, slice(None)), (part, slice(1000, 1500))):
        leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
        with running_on("cpu"):
            outputs = add_layer_norm_with_total(**leaves)
        gradient = torch.autograd.grad(outputs, leaves["x"], (dy[rows], dtotal[rows]))
        results.append({"y": outputs[0].detach(), "total": outputs[1].detach(), "dx": gradient[0]})
    assert_equal({name: t[1000:1500] for name, t in results[0].items()}, results[1])


def test_float64_is_for_the_reference_alone():
    x = normal(3, 8, dtype=torch.float64)
    assert layer_norm(x).dtype == torch.float64
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="x must be float32, float16 or bfloat16"):
        layer_norm(x)
