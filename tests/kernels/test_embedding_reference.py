"""The first link of the chain of trust: F.embedding in float64 and the published formulas <- embedding's reference.

The position tables are written out here number by number, from the paper and from the sources of the packages whose
checkpoints use them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import _philox, embedding, sinusoidal_positions, use_backend
from tests.oracle import run_with_gradients

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


# ---------------------------------------------------------------- the tables


def paper(position: int, column: int, width: int) -> float:
    """Vaswani et al. 2017, section 3.5: even columns are sines, odd ones cosines."""
    angle = position / 10000 ** (2 * (column // 2) / width)
    return math.sin(angle) if column % 2 == 0 else math.cos(angle)


def hugging_face_marian(position: int, column: int, width: int) -> float:
    """All of the paper's even columns, then all of its odd ones (an odd width has one more of the former)."""
    sines = width // 2 if width % 2 == 0 else width // 2 + 1
    return paper(position, 2 * column if column < sines else 2 * (column - sines) + 1, width)


def tensor2tensor(position: int, column: int, width: int) -> float:
    """get_timing_signal_1d with min_timescale 1 and max_timescale 10^4."""
    timescales = width // 2
    if column == 2 * timescales:
        return 0.0  # the column that pads an odd width
    increment = math.log(1e4 / 1.0) / max(timescales - 1, 1)
    angle = position * math.exp(-(column % timescales) * increment)
    return math.sin(angle) if column < timescales else math.cos(angle)


FORMULAS = {"interleaved": paper, "concat_paper": hugging_face_marian, "concat_t2t": tensor2tensor}


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 64])
@pytest.mark.parametrize("layout", FORMULAS)
def test_the_table_is_the_published_one(layout, width):
    start, length = 95, 12
    got = sinusoidal_positions(length, width, layout=layout, start=start, dtype=DOUBLE)
    expected = torch.tensor(
        [[FORMULAS[layout](start + row, column, width) for column in range(width)] for row in range(length)],
        dtype=DOUBLE,
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_tables_differ_as_documented():
    tables = {layout: sinusoidal_positions(1, 512, layout=layout, start=100, dtype=DOUBLE)[0] for layout in FORMULAS}
    reordered = torch.cat([tables["interleaved"][0::2], tables["interleaved"][1::2]])
    assert torch.equal(reordered, tables["concat_paper"])
    assert (reordered - tables["concat_t2t"]).abs().max().item() == pytest.approx(0.143, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_is_rounded_once(dtype):
    exact = sinusoidal_positions(300, 34, dtype=DOUBLE)
    assert torch.equal(sinusoidal_positions(300, 34, dtype=dtype), exact.to(dtype))
    assert sinusoidal_positions(0, 34).shape == (0, 34)
    assert sinusoidal_positions(3, 0).shape == (3, 0)


def test_float32_holds_at_large_positions():
    """A table made in float32 would be off by 0.5 at position 2^24."""
    for position in (2**20 + 1, 2**24 - 1):
        got = sinusoidal_positions(1, 8, start=position)[0]
        expected = torch.tensor([paper(position, column, 8) for column in range(8)])
        torch.testing.assert_close(got, expected, rtol=0, atol=1.2e-7)


# ---------------------------------------------------------------- the op


def functional(tokens, table, *, positions, layout="interleaved", scale=None, padding_idx=None):
    """F.embedding, the scale and the table's rows at `positions` (a nested list of numbers, or None)."""
    width = table.shape[1]
    out = F.embedding(tokens.long(), table, padding_idx) * (math.sqrt(width) if scale is None else scale)
    if positions is not None:
        rows = [[FORMULAS[layout](p, column, width) for column in range(width)] for p in positions]
        out = out + torch.tensor(rows, dtype=table.dtype).view(out.shape)
    if padding_idx is not None:
        out = out * (tokens != padding_idx)[..., None]
    return out


OPTIONS = {
    "plain": ({}, [0, 1, 2, 3, 0, 1, 2, 3], {}),
    "no_positions": ({"positions": None}, None, {}),
    "t2t": ({"positions": "concat_t2t"}, [0, 1, 2, 3, 0, 1, 2, 3], {"layout": "concat_t2t"}),
    "marian": ({"positions": "concat_paper"}, [0, 1, 2, 3, 0, 1, 2, 3], {"layout": "concat_paper"}),
    "scale": ({"scale": -0.3}, [0, 1, 2, 3, 0, 1, 2, 3], {"scale": -0.3}),
    "start": ({"start": 7}, [7, 8, 9, 10, 7, 8, 9, 10], {}),
    "starts": ({"start": torch.tensor([4, 70])}, [4, 5, 6, 7, 70, 71, 72, 73], {}),
    "position_ids": ({"position_ids": torch.tensor([[3, 3, 0, 9]])}, [3, 3, 0, 9, 3, 3, 0, 9], {}),
    "padding": ({"padding_idx": 2}, [0, 1, 2, 3, 0, 1, 2, 3], {"padding_idx": 2}),
    "padding_from_the_end": ({"padding_idx": -1}, [0, 1, 2, 3, 0, 1, 2, 3], {"padding_idx": 4}),
}


@pytest.mark.parametrize("tokens_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", OPTIONS)
def test_embedding_is_torch_s_embedding(name, tokens_dtype):
    options, positions, words = OPTIONS[name]
    tokens = torch.tensor([[2, 0, 4, 2], [2, 1, 4, 2]], dtype=tokens_dtype)
    tensors = {"tokens": tokens, "table": torch.randn(5, 9, dtype=DOUBLE)}
    got = run_with_gradients(embedding, tensors, **options)
    expected = run_with_gradients(functional, tensors, positions=positions, **words)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_output():
    tokens, table = torch.tensor([[2, 0, 1], [2, 2, 3]]), torch.randn(5, 7, dtype=DOUBLE, requires_grad=True)
    seed = torch.tensor([5])

    def function(table):
        return embedding(tokens, table, start=2, padding_idx=3, dropout_p=0.4, seed=seed)

    assert torch.autograd.gradcheck(function, (table,))


def test_dropout_drops_what_philox_says():
    tokens, table = torch.randint(0, 5, (3, 4)), torch.randn(5, 9, dtype=DOUBLE)
    seed = torch.tensor([-77])
    keep = _philox.keep_rows(seed, 0.3, 12, 9).view(3, 4, 9)
    got = embedding(tokens, table, dropout_p=0.3, seed=seed)
    expected = functional(tokens, table, positions=[0, 1, 2, 3] * 3) * keep / 0.7
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
