"""Embedding: every backend against the reference in float64, and what the docstring promises."""

from __future__ import annotations

import math

import pytest
import torch

from fused_transformer.kernels import _philox, embedding, sinusoidal_positions, use_backend
from fused_transformer.kernels.embedding import op, positions
from tests.inputs import (
    FLOATS,
    LAYOUTS,
    Case,
    case_id,
    dtype_id,
    normal,
    running_on,
    threads,
)
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

# The CPU kernels work on 4 vectors of up to 16 columns at a time going forward, on 8 and on 256 rows going back; the
# Triton kernels on up to 1024 columns going forward, on 512 and on runs of tokens cut at every 32 or more going back;
# the CUDA kernels on strips of 512 columns going forward, of 32 vectors or columns going back, and on the same runs.
CASES = (
    Case("one", shape=(1, 1), vocabulary=1, width=1),
    Case("prime", shape=(7, 11), vocabulary=101, width=1021),
    Case("below_a_vector", shape=(3, 5), width=15),
    Case("one_vector", shape=(3, 5), width=16),
    Case("above_a_vector", shape=(3, 5), width=17),
    Case("below_the_forward_block", shape=(3, 5), width=63),
    Case("the_forward_block", shape=(3, 5), width=64),
    Case("above_the_forward_block", shape=(3, 5), width=65),
    Case("the_backward_block", shape=(3, 5), vocabulary=256, width=128),
    Case("above_the_backward_block", shape=(3, 5), vocabulary=257, width=129),
    Case("below_the_backward_block", shape=(3, 5), vocabulary=255, width=127),
    Case("two_column_blocks_of_triton", shape=(2, 3), width=1025),
    Case("wide", shape=(2, 3), width=8200),
    Case("tall", shape=(103, 11), vocabulary=600, width=24),
    Case("one_token_repeated", shape=(40, 30), vocabulary=1, width=40),
    Case("scalar", shape=()),
    Case("one_axis", shape=(9,)),
    Case("three_axes", shape=(2, 3, 4)),
    Case("no_rows", shape=(0, 5)),
    Case("no_length", shape=(3, 0)),
    Case("int32", shape=(4, 6), tokens_dtype=torch.int32),
    Case("no_positions", shape=(4, 6), positions=None),
    Case("concat_t2t", shape=(4, 6), positions="concat_t2t"),
    Case("concat_t2t_odd_width", shape=(4, 6), positions="concat_t2t", width=33),
    Case("concat_paper", shape=(4, 6), positions="concat_paper"),
    Case("concat_paper_odd_width", shape=(4, 6), positions="concat_paper", width=33),
    Case("scale", shape=(4, 6), scale=0.37),
    Case("start", shape=(4, 6), start=1000),
    Case("a_start_for_each_row", shape=(3, 6), start=torch.tensor([0, 700, 3])),
    Case("int32_starts_of_three_axes", shape=(2, 2, 5), start=torch.tensor([[0, 9], [4, 1]], dtype=torch.int32)),
    Case("a_start_for_one_axis", shape=(6,), start=torch.tensor(5)),
    Case("position_ids", shape=(3, 6), position_ids=torch.tensor([[0, 0, 1, 2, 600, 3]] * 3)),
    Case("position_ids_of_one_row", shape=(3, 6), position_ids=torch.arange(6, dtype=torch.int32)[None]),
    Case("padding", shape=(9, 6), padding_idx=0, vocabulary=5),
    Case("padding_from_the_end", shape=(9, 6), padding_idx=-1, vocabulary=5),
    Case("dropout", shape=(9, 6), dropout_p=0.3, width=200),
    Case("much_dropout_and_no_positions", shape=(9, 6), dropout_p=0.9, width=77, positions=None),
    Case("dropout_of_everything", shape=(9, 6), dropout_p=1.0),
    Case("everything", shape=(9, 6), vocabulary=7, width=130, start=3, scale=2.0, padding_idx=2, dropout_p=0.2),
)
OPTIONS = ("positions", "scale", "start", "position_ids", "padding_idx", "dropout_p")


def make(case: Case, dtype=torch.float32, device="cpu"):
    vocabulary = case.get("vocabulary", 50)
    tokens = torch.randint(0, vocabulary, case["shape"], dtype=case.get("tokens_dtype", torch.int64), device=device)
    table = normal(vocabulary, case.get("width", 32), dtype=dtype, device=device)
    options = {name: case[name] for name in OPTIONS if name in case}
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if "dropout_p" in case:
        options["seed"] = torch.tensor([2**62 + 12345], device=device)
    return {"tokens": tokens, "table": table}, options


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("backend", op.order)
def test_matches_the_reference(backend, case, dtype, device):
    tensors, options = make(case, dtype, device)
    assert_backend_matches(embedding, backend, tensors, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", op.order)
def test_any_strides(backend, layout, device):
    tensors, options = make(CASES[1], device=device)
    tensors["table"] = LAYOUTS[layout](tensors["table"])
    tensors["tokens"] = tensors["tokens"].T.contiguous().T if layout == "transposed" else tensors["tokens"]
    if layout == "expanded":
        tensors["tokens"] = tensors["tokens"][:1].expand_as(tensors["tokens"])
    assert_backend_matches(embedding, backend, tensors, **options)


def test_the_cpu_kernel_takes_all_it_should():
    for dtype in FLOATS:
        for case in CASES:
            tensors, options = make(case, dtype)
            with use_backend("cpu"):
                run_with_gradients(embedding, tensors, **options)
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="table must be float32, float16 or bfloat16"):
        embedding(tensors["tokens"], tensors["table"].double())


@pytest.mark.parametrize("name", ["tall", "everything", "one_token_repeated", "wide"])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_the_same_bits_with_any_number_of_threads(name, dtype):
    case = next(case for case in CASES if case.name == name)
    tensors, options = make(Case(name, **{**case, "shape": (32, 9)}), dtype)
    with use_backend("cpu"):
        with threads(1):
            expected = run_with_gradients(embedding, tensors, **options)
        for count in (2, 3, 7):
            with threads(count):
                assert_equal(run_with_gradients(embedding, tensors, **options), expected)


@pytest.mark.parametrize("backend", op.order)
def test_dropout_zeroes_what_philox_says(backend, device):
    tokens, table = torch.randint(0, 20, (8, 5), device=device), torch.rand(20, 67, device=device) + 2
    seed = torch.tensor([99], device=device)
    with running_on(backend):
        plain = embedding(tokens, table)
        dropped = embedding(tokens, table, dropout_p=0.25, seed=seed)
    keep = _philox.keep_rows(seed, 0.25, 40, 67).view(8, 5, 67)
    assert torch.equal(dropped != 0, keep)
    torch.testing.assert_close(dropped, torch.where(keep, plain / 0.75, 0))


def test_dropout_without_a_seed_follows_torch_s_generator():
    tensors, _ = make(CASES[1])
    torch.manual_seed(1)
    first = embedding(**tensors, dropout_p=0.5)
    second = embedding(**tensors, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(embedding(**tensors, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_no_gradient_needed_gives_the_same_bits():
    tensors, options = make(CASES[-1])
    plain = embedding(**tensors, **options)
    tensors["table"].requires_grad_()
    assert torch.equal(embedding(**tensors, **options), plain)
    with torch.no_grad():
        assert not embedding(**tensors, **options).requires_grad


@pytest.mark.parametrize("backend", op.order)
def test_the_gradient_of_a_sum_counts_the_tokens(backend, device):
    table = torch.zeros(6, 33, device=device, requires_grad=True)
    tokens = torch.tensor([[0, 5, 5], [2, 0, 5]], device=device)
    with running_on(backend):
        embedding(tokens, table, scale=3.0, padding_idx=2).sum().backward()  # an upstream gradient of stride 0
    counts = torch.tensor([2.0, 0, 0, 0, 0, 3], device=device)
    assert torch.equal(table.grad, 3 * counts[:, None].expand(6, 33))


# ---------------------------------------------------------------- positions


def test_positions_beyond_any_table():
    width, start = 8, 10**9
    got = embedding(torch.zeros(3, dtype=torch.long), torch.zeros(1, width), start=start)
    for row, p in enumerate(range(start, start + 3)):
        for i in range(width // 2):
            angle = p / 10000 ** (2 * i / width)
            assert got[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"start": 300}, 512),
        ({"start": torch.tensor([2, 10**5, 40])}, 2**17),
        ({"position_ids": torch.tensor([[3, 3, 800, 10**5, 0]])}, 2**17),
    ],
    ids=["start", "starts", "position_ids"],
)
def test_a_table_too_large_to_keep_changes_nothing(options, rows, monkeypatch):
    tensors, _ = make(Case("x", shape=(3, 5), width=20))
    monkeypatch.setattr(positions, "TABLES", {})
    kept = embedding(**tensors, **options)
    assert [len(table) for table in positions.TABLES.values()] == [rows]
    monkeypatch.setattr(positions, "_LARGEST_TABLE_BYTES", 1000)
    monkeypatch.setattr(positions, "TABLES", {})
    computed = embedding(**tensors, **options)
    assert not positions.TABLES
    assert torch.equal(kept, computed)


def test_the_kept_table_grows(monkeypatch):
    monkeypatch.setattr(positions, "TABLES", {})
    table = torch.zeros(1, 6)
    for length in (3, 512, 513, 2000, 10):
        got = embedding(torch.zeros(2, length, dtype=torch.long), table)
        assert torch.equal(got[1], sinusoidal_positions(length, 6))
    assert [len(kept) for kept in positions.TABLES.values()] == [2048]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("backend", op.order)
@pytest.mark.parametrize("bad", [10, -1, 2**31 - 1])
@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
def test_a_token_outside_the_vocabulary(backend, bad, tokens_dtype, device):
    if backend in ("cuda", "triton") and device == "cuda":
        pytest.skip("nobody waits for the GPU to know: test_embedding_device.py says what happens instead")
    tokens = torch.randint(0, 10, (200, 30), dtype=tokens_dtype, device=device)
    tokens[150, 2] = bad
    tokens[17, 29] = bad
    table = torch.randn(10, 64, device=device)
    expected = rf"tokens holds {bad} at index \[17, 29\], outside the vocabulary of 10"
    with running_on(backend), pytest.raises(IndexError, match=expected):
        embedding(tokens, table)
    with running_on(backend), pytest.raises(IndexError, match=rf"tokens holds {bad}, outside"):
        embedding(tokens[17, 29], table)


TOKENS, TABLE = torch.zeros(2, 3, dtype=torch.long), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("error", "sentence", "change"),
    [
        (TypeError, "tokens must be a torch.Tensor, got list", {"tokens": [1, 2]}),
        (ValueError, "tokens must be int32 or int64", {"tokens": torch.zeros(2, 3)}),
        (TypeError, "table must be a torch.Tensor", {"table": [[1.0]]}),
        (ValueError, "table must be float32", {"table": torch.zeros(5, 4, dtype=torch.long)}),
        (ValueError, r"table must have shape \(V, E\), got \(5,\)", {"table": torch.zeros(5)}),
        (ValueError, "tokens must be on meta", {"table": TABLE.to("meta")}),
        (ValueError, "positions must be one of interleaved", {"positions": "rotary"}),
        (ValueError, "need positions", {"positions": None, "start": 3}),
        (ValueError, "need positions", {"positions": None, "position_ids": TOKENS}),
        (ValueError, "start must not be negative, got -1", {"start": -1}),
        (ValueError, r"start must be at most 2\^53", {"start": 2**62}),
        (ValueError, r"start must be at most 2\^53", {"start": torch.tensor([1, 2**62])}),
        (TypeError, "start must be an int", {"start": 1.5}),
        (ValueError, "start must be int32 or int64", {"start": torch.zeros(2)}),
        (ValueError, r"start must be a number or have shape \(2,\), got \(3,\)", {"start": torch.tensor([1, 2, 3])}),
        (ValueError, "start must not be negative, got -4", {"start": torch.tensor([1, -4])}),
        (ValueError, "not both", {"start": 2, "position_ids": TOKENS}),
        (ValueError, "position_ids must not be negative, got -2", {"position_ids": TOKENS - 2}),
        (ValueError, "must broadcast to tokens", {"position_ids": torch.zeros(2, 4, dtype=torch.long)}),
        (TypeError, "position_ids must be a torch.Tensor", {"position_ids": [1, 2, 3]}),
        (ValueError, "padding_idx must be within the vocabulary of 5, got 5", {"padding_idx": 5}),
        (ValueError, "padding_idx must be within the vocabulary of 5, got -6", {"padding_idx": -6}),
        (ValueError, "dropout_p must be between 0 and 1, got 1.5", {"dropout_p": 1.5}),
        (ValueError, "seed must be", {"dropout_p": 0.5, "seed": torch.zeros(1)}),
    ],
)
def test_what_it_refuses(error, sentence, change):
    with pytest.raises(error, match=sentence):
        embedding(**{"tokens": TOKENS, "table": TABLE, **change})


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("length must not be negative, got -1", {"length": -1, "width": 4}),
        ("width must not be negative", {"length": 1, "width": -4}),
        ("start must not be negative", {"length": 1, "width": 4, "start": -3}),
        ("layout must be one of", {"length": 1, "width": 4, "layout": "other"}),
        ("dtype must be float32", {"length": 1, "width": 4, "dtype": torch.int64}),
    ],
)
def test_what_the_position_table_refuses(sentence, arguments):
    with pytest.raises(ValueError, match=sentence):
        sinusoidal_positions(**arguments)
