"""Cross entropy on every backend, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import cross_entropy, use_backend
from fused_transformer.kernels.cross_entropy import op
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
    Case("below_a_backward_chunk", rows=3, cols=2047, mean=0.0),
    Case("backward_chunk", rows=3, cols=2048, mean=0.0),
    Case("above_a_backward_chunk", rows=3, cols=2049, mean=0.0),
    Case("below_a_forward_chunk", rows=3, cols=4095, mean=0.0),
    Case("forward_chunk", rows=3, cols=4096, mean=0.0),
    Case("above_a_forward_chunk", rows=3, cols=4097, mean=0.0),
    Case("many_chunks", rows=2, cols=32_003, mean=0.0),
    Case("far_below_zero", rows=9, cols=5000, mean=-3000.0),
)
OPTIONS = {
    "plain": {},
    "uniform": {"label_smoothing": 0.1},
    "others": {"label_smoothing": 0.2, "smoothing": "others"},
    "uniform_alone": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.1, "smoothing": "others", "z_loss": 0.01, "ignore_index": 3},
}


def make(rows, cols, dtype=torch.float32, *, device="cpu", mean=0.0, std=3.0, ignored=True):
    """Logits, and random targets of which every fifth is ignored."""
    targets = torch.randint(0, cols, (rows,))
    if ignored:
        targets[1::5] = -100
    return {"logits": normal(rows, cols, dtype=dtype, device=device, mean=mean, std=std), "targets": targets.to(device)}


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, case, dtype, device):
    tensors = make(case["rows"], case["cols"], dtype, device=device, mean=case["mean"])
    for label_smoothing in (0.0, 0.1):
        got = assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=label_smoothing, reduction="none")
    assert got["out"].dtype == torch.float32 and got["dlogits"].dtype == dtype


@pytest.mark.every_isa
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_present_and_absent(backend, dtype, options, reduction, device):
    tensors = make(23, 70, dtype, device=device, mean=2.0)
    if "ignore_index" in OPTIONS[options]:
        tensors["targets"][1::5] = OPTIONS[options]["ignore_index"]
    assert_backend_matches(cross_entropy, backend, tensors, reduction=reduction, **OPTIONS[options])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_256_thousand(backend, dtype, label_smoothing, device):
    tensors = make(2, 256_000, dtype, device=device)
    tensors["targets"][1] = 255_999
    assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=label_smoothing)


@pytest.mark.parametrize("std", [30.0, 1000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_one_word_far_above_the_others(backend, std, device):
    tensors = make(40, 300, device=device, std=std)
    assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=0.1, reduction="none")


@pytest.mark.every_isa
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_maximum_may_move_with_every_chunk(backend, order, device):
    """The running maximum: sums taken relative to the old one are carried over to the new one."""
    slope = torch.linspace(-200, 300, 20_000, dtype=torch.float64)
    slope = slope if order == "rising" else slope.flip(0)
    logits = (slope + torch.randn(3, 20_000, dtype=torch.float64)).float().to(device)
    tensors = {"logits": logits, "targets": torch.tensor([0, 10_000, 19_999], device=device)}
    assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, dtype, layout, device):
    for cols in (64, 67):
        tensors = make(12, cols, dtype, device=device)
        tensors["logits"] = LAYOUTS[layout](tensors["logits"])
        assert_backend_matches(cross_entropy, backend, tensors, label_smoothing=0.1)


@pytest.mark.parametrize("targets_dtype", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_any_strides_and_of_both_integers(backend, targets_dtype, device):
    tensors = make(24, 50, device=device)
    logits, targets = tensors["logits"].view(4, 6, 50), tensors["targets"].to(targets_dtype).view(6, 4).t()
    assert not targets.is_contiguous()
    got = assert_backend_matches(cross_entropy, backend, {"logits": logits, "targets": targets}, reduction="none")
    assert got["out"].shape == (4, 6)
    for targets in (tensors["targets"].to(targets_dtype)[::2], tensors["targets"].to(targets_dtype)[:1].expand(12)):
        flat = {"logits": tensors["logits"][:12], "targets": targets}  # one axis: flattening it copies nothing
        assert_backend_matches(cross_entropy, backend, flat, reduction="none")


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_shape(backend, reduction, shape, device):
    tensors = {"logits": normal(*shape, 24, device=device), "targets": torch.randint(0, 24, shape, device=device)}
    got = assert_backend_matches(cross_entropy, backend, tensors, reduction=reduction)
    assert got["out"].shape == (shape if reduction == "none" else ())
    assert got["dlogits"].shape == (*shape, 24)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_twice_is_bitwise_equal(backend, dtype, device):
    tensors = make(33, 5001, dtype, device=device)
    with running_on(backend):
        first, second = (run_with_gradients(cross_entropy, tensors, label_smoothing=0.1) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("cols", [24, 700, 5001])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_row_does_not_depend_on_the_others(backend, dtype, cols, device):
    tensors = make(40, cols, dtype, device=device, ignored=False)
    upstream = normal(40, device=device)
    results = []
    for rows in (slice(None), slice(17, 20)):
        logits = tensors["logits"][rows].clone().requires_grad_()
        with running_on(backend):
            losses = cross_entropy(logits, tensors["targets"][rows], label_smoothing=0.1, reduction="none")
        (gradient,) = torch.autograd.grad(losses, logits, upstream[rows])
        results.append({"losses": losses.detach(), "gradient": gradient})
    assert_equal({name: x[17:20] for name, x in results[0].items()}, results[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_the_same_with_and_without_a_gradient_to_come(backend, device):
    tensors = make(9, 300, device=device)
    with running_on(backend):
        plain = cross_entropy(**tensors, label_smoothing=0.1)
        trained = cross_entropy(tensors["logits"].requires_grad_(), tensors["targets"], label_smoothing=0.1)
    assert trained.requires_grad and not plain.requires_grad
    assert_equal(plain, trained.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_strides(backend, device):
    tensors = make(12, 40, device=device)
    logits = tensors["logits"].requires_grad_()
    with running_on(backend):
        losses = cross_entropy(logits, tensors["targets"], reduction="none")
    base = normal(24, device=device)
    for upstream in (base[::2], base[:1].expand(12)):
        strided = torch.autograd.grad(losses, logits, upstream, retain_graph=True)
        dense = torch.autograd.grad(losses, logits, upstream.contiguous(), retain_graph=True)
        assert_equal(strided, dense)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_the_same_bits_on_any_number_of_threads(dtype):
    tensors = make(37, 5001, dtype)
    with running_on("cpu"), threads(1):
        alone = run_with_gradients(cross_entropy, tensors, label_smoothing=0.1, reduction="none")
    with running_on("cpu"), threads(3):
        assert_equal(run_with_gradients(cross_entropy, tensors, label_smoothing=0.1, reduction="none"), alone)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_gradients_that_go_past_the_cache_are_the_same(dtype):
    # 4 MiB and more are stored past the cache (csrc/common/stream.h), the rows of a part of them are not
    tensors, upstream = make(1100, 2048, dtype), normal(1100)
    results = []
    for rows in (slice(None), slice(500, 520)):
        logits = tensors["logits"][rows].clone().requires_grad_()
        with running_on("cpu"):
            losses = cross_entropy(logits, tensors["targets"][rows], label_smoothing=0.1, reduction="none")
        results.append(torch.autograd.grad(losses, logits, upstream[rows])[0])
    assert_equal(results[0][500:520], results[1])


def test_float64_is_for_the_reference_alone():
    tensors = make(3, 8, torch.float64)
    assert cross_entropy(**tensors).dtype == torch.float64
    with use_backend("triton"), pytest.raises(NotImplementedError, match="logits must be float32, float16 or bfloat16"):
        cross_entropy(**tensors)
