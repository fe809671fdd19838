"""What is Triton's own in embedding: positions computed in the kernel, runs of tokens over chunks, bad tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fused_transformer.kernels import embedding, sinusoidal_positions
from fused_transformer.kernels.embedding import positions
from tests.inputs import FLOATS, dtype_id, normal, running_on
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

pytest.importorskip("triton")

from fused_transformer.kernels.embedding import triton as backend
from fused_transformer.kernels.embedding import triton_backward, triton_forward


@pytest.fixture
def end_unknown(monkeypatch):
    """As on a GPU: where positions are in tensors, their largest is not known to the host."""
    monkeypatch.setattr(positions, "_end", lambda *_: None)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("width", [1, 2, 3, 34, 65])
@pytest.mark.parametrize("layout", positions.LAYOUTS)
def test_computed_positions_are_those_of_the_table(layout, width, end_unknown, device):
    ids = torch.cat([torch.arange(70), torch.randint(0, 2**17, (60,)), torch.tensor([2**17 - 1])]).to(device)
    table = torch.zeros(1, width, device=device)
    with running_on("triton"):
        got = embedding(torch.zeros_like(ids), table, positions=layout, position_ids=ids)
    expected = sinusoidal_positions(2**17, width, layout=layout, device=device)[ids]
    assert_equal(got, expected)


@pytest.mark.parametrize("layout", positions.LAYOUTS)
def test_computed_positions_far_out(layout, end_unknown, device):
    starts = torch.tensor([2**20, 2**24 - 3, 10**9, 2**31, 0], device=device)
    with running_on("triton"):
        got = embedding(
            torch.zeros(5, 3, dtype=torch.long, device=device),
            torch.zeros(1, 12, device=device),
            positions=layout,
            start=starts,
        )
    for row, start in zip(got, starts.tolist(), strict=True):
        expected = sinusoidal_positions(3, 12, layout=layout, start=start, dtype=torch.float64, device=device)
        # float64 tells angles of size a apart to a / 2^53, and float32 numbers near 1 to 2^-24
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=2**-24 + 2 * start * 2**-53)


def test_every_quarter_of_a_turn(end_unknown, device):
    ids = torch.arange(0, 100, device=device)
    with running_on("triton"):
        got = embedding(torch.zeros_like(ids), torch.zeros(1, 2, device=device), position_ids=ids)
    expected = [[math.sin(p), math.cos(p)] for p in range(100)]
    torch.testing.assert_close(got.cpu().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2**-24)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("start", [torch.tensor([0, 700, 3]), torch.tensor([5, 10**6, 2], dtype=torch.int32)])
def test_a_start_for_each_row_matches_the_reference(start, dtype, end_unknown, device):
    tensors = {
        "tokens": torch.randint(0, 20, (3, 6), device=device),
        "table": normal(20, 40, dtype=dtype, device=device),
    }
    assert_backend_matches(embedding, "triton", tensors, start=start.to(device), padding_idx=3)


# ---------------------------------------------------------------- runs of equal tokens


def tokens_of(counts: dict[int, int], device: str) -> torch.Tensor:
    """Each token as often as `counts` says, shuffled."""
    tokens = torch.cat([torch.full((count,), token) for token, count in counts.items()])
    return tokens[torch.randperm(len(tokens))].to(device)


RUNS = {
    "one_of_many_chunks": {2: 1100},
    "many_within_a_chunk": dict.fromkeys(range(30), 3),
    "from_the_middle_of_a_chunk_to_the_middle_of_another": {0: 40, 1: 70, 2: 5, 3: 50},
    "whole_chunks": {0: 32, 1: 64, 2: 32},
    "one_less_and_one_more": {0: 31, 1: 33, 2: 65, 3: 63, 4: 1},
    "a_chunk_in_which_one_ends_and_one_begins": {0: 48, 1: 48, 2: 48},
    "a_frequent_one_among_rare_ones": {0: 1, 1: 1, 7: 700, 8: 1, 9: 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_over_chunks(name, device):
    counts = RUNS[name]
    assert triton_backward.chunk_of(sum(counts.values())) == 32
    tensors = {"tokens": tokens_of(counts, device), "table": normal(31, 18, device=device)}
    seed = torch.tensor([5], device=device)
    for options in ({}, {"dropout_p": 0.3, "seed": seed}, {"padding_idx": max(counts, key=counts.get)}):
        assert_backend_matches(embedding, "triton", tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_the_same_call_twice_is_bitwise_equal(dtype, device):
    tensors = {"tokens": tokens_of({0: 50, 3: 40, 4: 9}, device), "table": normal(6, 90, dtype=dtype, device=device)}
    options = {"dropout_p": 0.1, "seed": torch.tensor([-3], device=device)}
    with running_on("triton"):
        first, second = (run_with_gradients(embedding, tensors, **options) for _ in range(2))
    assert_equal(first, second)


def test_chunks_grow_with_the_number_of_tokens():
    assert [triton_backward.chunk_of(count) for count in (1, 1000, 16_384, 2**20)] == [32, 32, 64, 512]
    for width in (1, 16, 24, 512, 513, 1024, 8200):
        (rows, cols), (run_rows, run_cols) = triton_forward.tile(width), triton_backward.run_tile(width)
        assert cols % 16 == run_cols % 16 == 0  # dropout's bits come four columns at a time
        assert rows * cols <= triton_forward.ELEMENTS and run_rows * run_cols <= triton_backward.RUN_ELEMENTS


# ---------------------------------------------------------------- tokens outside the vocabulary


@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
def test_where_nobody_waits_a_bad_token_gives_nan_and_no_gradient(tokens_dtype, monkeypatch, device):
    monkeypatch.setattr(backend, "_check", lambda *_: None)  # as on a GPU
    good = torch.tensor([[1, 0, 3], [3, 2, 2]], dtype=tokens_dtype, device=device)
    bad, places = good.clone(), torch.tensor([[True, False, False], [False, True, True]], device=device)
    bad[places] = torch.tensor([4, -1, 2**31 - 1], dtype=tokens_dtype, device=device)
    whole = normal(6, 40, device=device)
    tensors = {"table": whole[1:5]}  # the rows beside the table's are there, and not read
    with running_on("triton"):
        expected, got = (run_with_gradients(embedding, {"tokens": t, **tensors}) for t in (good, bad))
    assert bool(got["out"][places].isnan().all())
    assert_equal(got["out"][~places], expected["out"][~places])
    with running_on("triton"):
        seen = run_with_gradients(embedding, {"tokens": good[~places], **tensors}, positions=None, scale=1.0)
        table = tensors["table"].detach().requires_grad_()
        out = embedding(bad, table, positions=None, scale=1.0)
        upstream = torch.zeros_like(out)
        upstream[~places] = _upstream_of(seen["out"])
        (gradient,) = torch.autograd.grad(out, table, upstream)
    assert_equal(gradient, seen["dtable"])


def _upstream_of(out: torch.Tensor) -> torch.Tensor:
    """What run_with_gradients sends into `out`."""
    generator = torch.Generator().manual_seed(20170612)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
