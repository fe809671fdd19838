"""What the embedding's backends on a GPU have of their own: computed positions, runs cut into chunks, bad tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fused_transformer.kernels import embedding, sinusoidal_positions
from fused_transformer.kernels.embedding import op, positions
from fused_transformer.kernels.embedding.device import chunk_of
from tests.inputs import FLOATS, dtype_id, normal, running_on
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

BACKENDS = ("cuda", "triton")


@pytest.fixture
def end_unknown(monkeypatch):
    """As on a GPU: where positions are in tensors, their largest is not known to the host."""
    monkeypatch.setattr(positions, "_end", lambda *_: None)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("width", [1, 2, 3, 34, 65])
@pytest.mark.parametrize("layout", positions.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_computed_positions_are_those_of_the_table(backend, layout, width, end_unknown, device):
    ids = torch.cat([torch.arange(70), torch.randint(0, 2**17, (60,)), torch.tensor([2**17 - 1])]).to(device)
    table = torch.zeros(1, width, device=device)
    with running_on(backend):
        got = embedding(torch.zeros_like(ids), table, positions=layout, position_ids=ids)
    expected = sinusoidal_positions(2**17, width, layout=layout, device=device)[ids]
    assert_equal(got, expected)


@pytest.mark.parametrize("layout", positions.LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_computed_positions_far_out(backend, layout, end_unknown, device):
    starts = torch.tensor([2**20, 2**24 - 3, 10**9, 2**31, 0], device=device)
    with running_on(backend):
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_quarter_of_a_turn(backend, end_unknown, device):
    ids = torch.arange(0, 100, device=device)
    with running_on(backend):
        got = embedding(torch.zeros_like(ids), torch.zeros(1, 2, device=device), position_ids=ids)
    expected = [[math.sin(p), math.cos(p)] for p in range(100)]
    torch.testing.assert_close(got.cpu().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2**-24)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("start", [torch.tensor([0, 700, 3]), torch.tensor([5, 10**6, 2], dtype=torch.int32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_for_each_row_matches_the_reference(backend, start, dtype, end_unknown, device):
    tensors = {
        "tokens": torch.randint(0, 20, (3, 6), device=device),
        "table": normal(20, 40, dtype=dtype, device=device),
    }
    assert_backend_matches(embedding, backend, tensors, start=start.to(device), padding_idx=3)


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
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_over_chunks(backend, name, device):
    counts = RUNS[name]
    assert chunk_of(sum(counts.values())) == 32
    tensors = {"tokens": tokens_of(counts, device), "table": normal(31, 18, device=device)}
    seed = torch.tensor([5], device=device)
    for options in ({}, {"dropout_p": 0.3, "seed": seed}, {"padding_idx": max(counts, key=counts.get)}):
        assert_backend_matches(embedding, backend, tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_twice_is_bitwise_equal(backend, dtype, device):
    tensors = {"tokens": tokens_of({0: 50, 3: 40, 4: 9}, device), "table": normal(6, 90, dtype=dtype, device=device)}
    options = {"dropout_p": 0.1, "seed": torch.tensor([-3], device=device)}
    with running_on(backend):
        first, second = (run_with_gradients(embedding, tensors, **options) for _ in range(2))
    assert_equal(first, second)


def test_chunks_grow_with_the_number_of_tokens():
    assert [chunk_of(count) for count in (1, 1000, 16_384, 16_900, 20_000, 2**20)] == [32, 32, 64, 128, 128, 512]


# ---------------------------------------------------------------- tokens outside the vocabulary


@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nobody_waits_a_bad_token_gives_nan_and_no_gradient(backend, tokens_dtype, monkeypatch, device):
    module = op.module(backend)
    if isinstance(module, str):
        pytest.skip(f"embedding, {backend}: {module}")
    monkeypatch.setattr(module, "check_tokens", lambda *_: None)  # as on a GPU
    good = torch.tensor([[1, 0, 3], [3, 2, 2]], dtype=tokens_dtype, device=device)
    bad, places = good.clone(), torch.tensor([[True, False, False], [False, True, True]], device=device)
    bad[places] = torch.tensor([4, -1, 2**31 - 1], dtype=tokens_dtype, device=device)
    whole = normal(6, 40, device=device)
    tensors = {"table": whole[1:5]}  # the rows beside the table's are there, and not read
    with running_on(backend):
        expected, got = (run_with_gradients(embedding, {"tokens": t, **tensors}) for t in (good, bad))
    assert bool(got["out"][places].isnan().all())
    assert_equal(got["out"][~places], expected["out"][~places])
    with running_on(backend):
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
