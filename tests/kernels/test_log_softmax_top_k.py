"""log_softmax_top_k on every backend, against torch's log_softmax and topk in float64."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import log_softmax_top_k, use_backend
from fused_transformer.kernels.log_softmax_top_k import op
from tests.inputs import (
    FLOATS,
    LAYOUTS,
    Case,
    as_offset,
    case_id,
    dtype_id,
    normal,
    running_on,
    threads,
)
from tests.oracle import assert_equal, assert_matches

every_backend = pytest.mark.parametrize("backend", op.order)

# Above 4096 columns the CUDA kernel cuts rows in parts; above 32 kept a warp holds them in two registers a lane.
CASES = (
    Case("one", rows=1, beams=1, cols=1, k=1),
    Case("one_row", rows=1, beams=1, cols=300, k=8),
    Case("prime", rows=15, beams=5, cols=1021, k=10),
    Case("below_a_vector", rows=8, beams=4, cols=15, k=8),
    Case("one_vector", rows=8, beams=4, cols=16, k=8),
    Case("above_a_vector", rows=8, beams=4, cols=17, k=8),
    Case("below_a_block", rows=4, beams=2, cols=1023, k=4),
    Case("above_a_block", rows=4, beams=2, cols=1025, k=4),
    Case("below_a_part", rows=4, beams=4, cols=4095, k=8),
    Case("a_part", rows=4, beams=4, cols=4096, k=8),
    Case("above_a_part", rows=4, beams=4, cols=4097, k=8),
    Case("many_parts", rows=4, beams=4, cols=32_003, k=8),
    Case("more_than_a_row_has", rows=12, beams=4, cols=5, k=17),
    Case("all_there_are", rows=12, beams=4, cols=5, k=20),
    Case("kept_by_32_lanes", rows=4, beams=2, cols=700, k=32),
    Case("kept_by_more", rows=4, beams=2, cols=700, k=33),
    Case("most_kept", rows=2, beams=1, cols=5000, k=64),
    Case("most_beams", rows=128, beams=64, cols=40, k=64),
    Case("greedy", rows=9, beams=1, cols=500, k=1),
    Case("empty", rows=0, beams=4, cols=64, k=8),
)


def make(case: Case, dtype=torch.float32, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and an addend of the size that hypotheses' log-probabilities have."""
    logits = normal(case["rows"], case["cols"], dtype=dtype, device=device, std=2.0)
    return logits, normal(case["rows"], device=device, mean=-8.0)


def run(backend, *args, **options):
    with running_on(backend):
        return log_softmax_top_k(*args, **options)


def assert_right(backend, logits, k, *, beams=1, addend=None):
    """The oracle: the values, and torch's float64 values at the places. Returns what the backend gave."""
    values, places = run(backend, logits, k, beams=beams, addend=addend)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    every = {}
    for dtype in (torch.float64, wide):
        log_probabilities = torch.log_softmax(logits, -1, dtype=dtype)
        if addend is not None:
            log_probabilities = log_probabilities + addend.to(dtype)[:, None]
        every[dtype] = log_probabilities.view(len(logits) // beams, beams * logits.shape[1])
    exact, naive = (every[dtype].topk(k).values for dtype in (torch.float64, wide))
    assert_matches(values, exact, naive)
    assert places.dtype == torch.int64 and places.shape == values.shape
    assert all(len(set(row)) == k for row in places.tolist()), "a place was chosen twice"
    assert_matches(every[torch.float64].gather(1, places).to(wide), exact, naive)
    assert (values[:, :-1] >= values[:, 1:]).all()
    return values, places


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@every_backend
def test_matches_torch(backend, case, dtype, device):
    logits, addend = make(case, dtype, device)
    assert_right(backend, logits, case["k"], beams=case["beams"], addend=addend)
    assert_right(backend, logits, case["k"], beams=case["beams"])


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@every_backend
def test_within_a_row_the_order_is_that_of_the_logits(backend, dtype, device):
    """Whatever rounding makes of the values: a stable sort, since 5000 numbers of 16 bits have many equal ones."""
    logits = normal(3, 5000, dtype=dtype, device=device)
    _, places = assert_right(backend, logits, 64)
    assert_equal(places, logits.sort(dim=1, descending=True, stable=True).indices[:, :64])


@pytest.mark.every_isa
@pytest.mark.parametrize("levels", [1, 2, 5])
@every_backend
def test_ties_go_to_the_lower_place(backend, levels, device):
    """Beams with the same logits, so that their values are equal to the last bit; few different ones."""
    row = torch.randint(levels, (300,)).float().to(device)
    logits = row.expand(3, 300).contiguous()
    addend = torch.full((3,), -1.5, device=device)
    _, places = assert_right(backend, logits, 60, beams=3, addend=addend)
    expected = logits.flatten().sort(descending=True, stable=True).indices[:60]
    assert_equal(places[0], expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@every_backend
def test_sorted_rows(backend, order, device):
    """Every logit of a rising row is among the best so far."""
    row = {"rising": torch.arange(4200.0), "falling": -torch.arange(4200.0), "equal": torch.zeros(4200)}[order]
    logits = (row / 100).repeat(2, 1).to(device)
    _, places = assert_right(backend, logits, 40, beams=2)
    assert_equal(places[0], logits.flatten().sort(descending=True, stable=True).indices[:40])


@pytest.mark.every_isa
@pytest.mark.parametrize("mean", [-3000.0, 1000.0, 1e30])
@every_backend
def test_logits_far_from_zero(backend, mean, device):
    logits = normal(6, 333, device=device, mean=mean, std=3.0)
    assert_right(backend, logits, 8, beams=3, addend=normal(6, device=device))


@pytest.mark.every_isa
@every_backend
def test_one_token_far_above_the_others(backend, device):
    assert_right(backend, normal(6, 333, device=device, std=1e4), 8, beams=3, addend=normal(6, device=device))


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_logits_of_any_strides(backend, layout, device):
    logits = LAYOUTS[layout](normal(8, 136, dtype=torch.bfloat16, device=device))
    assert_right(backend, logits, 8, beams=4, addend=as_offset(normal(8, device=device)))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=dtype_id)
@every_backend
def test_an_addend_of_another_dtype(backend, dtype, device):
    logits, addend = make(CASES[2], device=device)
    addend = addend.to(dtype)
    assert_equal(run(backend, logits, 4, addend=addend), run(backend, logits, 4, addend=addend.float()))


# ---------------------------------------------------------------- infinities and NaN


@pytest.mark.every_isa
@every_backend
def test_minus_infinity_is_chosen_last(backend, device):
    logits = normal(2, 40, device=device)
    logits[:, torch.arange(40) % 3 > 0] = -torch.inf  # 14 of a row remain
    values, places = assert_right(backend, logits, 33, beams=2)
    assert values[0, :28].isfinite().all() and (values[0, 28:] == -torch.inf).all()
    assert places[0, 28:].tolist() == [1, 2, 4, 5, 7]


@pytest.mark.every_isa
@every_backend
def test_a_beam_without_a_possible_token_is_chosen_last(backend, device):
    logits = normal(6, 5, device=device)
    logits[1] = -torch.inf
    values, places = run(backend, logits, 12, beams=3)
    assert values[0, :10].isfinite().all() and (values[0, 10:] == -torch.inf).all()
    assert places[0, 10:].tolist() == [5, 6]
    expected = assert_right(backend, logits[3:], 12, beams=3)
    assert_equal((values[1:], places[1:]), expected)


@pytest.mark.every_isa
@every_backend
def test_a_beam_of_addend_minus_infinity_is_chosen_last(backend, device):
    """The first step of beam search: one hypothesis, and the other beams are copies of it that don't count."""
    logits = normal(1, 6, device=device).repeat(4, 1)
    addend = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf], device=device)
    values, places = assert_right(backend, logits, 8, beams=4, addend=addend)
    assert (values[0, 6:] == -torch.inf).all() and (places[0, :6] < 6).all()
    assert_equal(places[0, 6:] - 6, logits[1].sort(descending=True, stable=True).indices[:2])


@pytest.mark.every_isa
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["first", "last", "all", "addend"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@every_backend
def test_nan_and_plus_infinity_leave_nothing_to_choose_in_their_sentence(backend, dtype, where, bad, device):
    case = Case("any", rows=9, beams=3, cols=90, k=6)
    logits, addend = make(case, dtype, device)
    expected = run(backend, logits, 6, beams=3, addend=addend)
    logits, addend = logits.clone(), addend.clone()
    if where == "addend":
        addend[4] = bad
    else:
        logits[4, {"first": 0, "last": 89, "all": slice(None)}[where]] = bad
    values, places = run(backend, logits, 6, beams=3, addend=addend)
    assert values[1].isnan().all() and places[1].tolist() == [0, 1, 2, 3, 4, 5]
    others = [0, 2]
    assert_equal((values[others], places[others]), [x[others] for x in expected])


# ---------------------------------------------------------------- determinism


@pytest.mark.every_isa
@every_backend
def test_the_same_bits_again_on_any_number_of_threads_and_alone(backend, device):
    if backend == "reference" and device != "cpu":
        pytest.skip("torch's own sums, which a GPU shares out by how many rows there are")
    case = Case("any", rows=12, beams=4, cols=4200, k=8)
    logits, addend = make(case, device=device)
    runs = []
    for count in (1, 2, 2, 5):
        with threads(count):
            runs.append(run(backend, logits, 8, beams=4, addend=addend))
    for other in runs[1:]:
        assert_equal(other, runs[0])
    alone = run(backend, logits[4:8], 8, beams=4, addend=addend[4:8])
    assert_equal(alone, [x[1:2] for x in runs[0]])


# ---------------------------------------------------------------- errors, and what else users lean on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits must have shape \(R, V\), got \(4,\)"),
        ({"logits": torch.zeros(4, 5).int()}, "logits must be float32, float16, bfloat16 or float64, got int32"),
        ({"logits": torch.zeros(4, 5).requires_grad_()}, "log_softmax_top_k has no gradient, and logits requires one"),
        ({"beams": 3}, "the rows must be a multiple of beams, got 4 and 3"),
        ({"beams": 0}, "the rows must be a multiple of beams, got 4 and 0"),
        ({"k": 0}, "k must be between 1 and beams · V = 10, got 0"),
        ({"k": 11}, "k must be between 1 and beams · V = 10, got 11"),
        ({"logits": torch.zeros(4, 0)}, "k must be between 1 and beams · V = 0, got 2"),
        ({"addend": torch.zeros(2)}, r"addend must have shape \(4,\), got \(2,\)"),
        ({"addend": torch.zeros(4).long()}, "addend must be float32, float16, bfloat16 or float64, got int64"),
        ({"addend": torch.zeros(4, device="meta")}, "all tensors must have the same device"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        log_softmax_top_k(**{"logits": torch.zeros(4, 5), "k": 2, "beams": 2, **change})


def test_something_else_than_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got list"):
        log_softmax_top_k([[1.0]], 1)


@pytest.mark.parametrize(("k", "beams"), [(65, 1), (2, 65)])
@pytest.mark.parametrize("backend", [name for name in op.order if name != "reference"])
def test_too_many_are_refused_in_words_and_go_to_the_reference(backend, k, beams):
    logits = normal(65, 90)
    if isinstance(op.module(backend), str):
        pytest.skip(f"log_softmax_top_k, {backend}: {op.module(backend)}")
    with use_backend(backend), pytest.raises(NotImplementedError, match=f"at most 64, got {k} and {beams}"):
        log_softmax_top_k(logits, k, beams=beams)
    assert_equal(log_softmax_top_k(logits, k, beams=beams), run("reference", logits, k, beams=beams))


def test_float64_goes_to_the_reference():
    logits = normal(6, 50, dtype=torch.float64)
    values, _ = assert_right("reference", logits, 5, beams=2, addend=normal(6, dtype=torch.float64))
    assert values.dtype == torch.float64
    assert_equal(log_softmax_top_k(logits, 5), run("reference", logits, 5))


@every_backend
def test_compiled_equals_eager(backend):
    logits, addend = make(CASES[2])

    def function(logits, addend):
        values, places = log_softmax_top_k(logits * 1.0, 4, beams=5, addend=addend)
        return values * 2.0, places + 1

    with running_on(backend):
        assert_equal(torch.compile(function, backend="eager")(logits, addend), function(logits, addend))
