"""Embedding, scale and positions against the chain that is written without a fused op, and torch.compile of it.

Bytes: a row of the table read and a row of the output written for each token (the positions stay in cache); with the
gradient also the upstream gradient read and the table's gradient written, once each. Operations: a product and a sum
for each number of the output; with the gradient two more.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import shapes
from bench.agreement import forward_backward
from bench.baselines import compiled
from fused_transformer.kernels import embedding, sinusoidal_positions


def chain(tokens, table, *, positions):
    return F.embedding(tokens, table) * math.sqrt(table.shape[1]) + positions.to(table.dtype)


def make(shape: shapes.Embedding, device: str, grad: bool = False):
    """Tokens as text has them (Zipf: the frequency of the n-th word is like 1/n), the table, and its positions."""
    frequency = 1.0 / torch.arange(1, shape.vocabulary + 1)
    tokens = torch.multinomial(frequency, shape.batch * shape.length, replacement=True)
    tokens = tokens.view(shape.batch, shape.length).to(device)
    table = torch.randn(shape.vocabulary, shape.width) / math.sqrt(shape.width)
    table = table.to(device, shape.dtype).requires_grad_(grad)
    return (tokens, table), sinusoidal_positions(shape.length, shape.width, dtype=torch.float64, device=device)


def numbers(shape: shapes.Embedding) -> int:
    return shape.batch * shape.length * shape.width


def row_bytes(shape: shapes.Embedding) -> int:
    return numbers(shape) * shape.dtype.itemsize


@pytest.mark.parametrize(
    "shape",
    [shapes.EMBEDDING_BASE, shapes.EMBEDDING_BIG, shapes.EMBEDDING_BASE_BF16, shapes.EMBEDDING_STEP],
    ids=str,
)
def bench_embedding(compare, shape, device):
    args, exact_positions = make(shape, device)
    positions = exact_positions.to(shape.dtype)  # a model keeps them in its own dtype
    implementations = {"naive": partial(chain, positions=positions), "fused": embedding}
    if shape is shapes.EMBEDDING_BASE:
        implementations["compile"] = compiled(implementations["naive"])
    exact = partial(lambda tokens, table: chain(tokens, table.double(), positions=exact_positions))
    compare(implementations, args, bytes_moved=2 * row_bytes(shape), flops=2 * numbers(shape), exact=exact)


@pytest.mark.parametrize("shape", [shapes.EMBEDDING_BASE], ids=str)
def bench_embedding_dropout(compare, shape, device):
    """In training: dropout of 0.1. The masks differ, so what is compared is the share of zeros and the mean."""
    args, positions = make(shape, device)
    positions = positions.to(shape.dtype)

    def check(results):
        rounding = {"rtol": 1e-4, "atol": 1e-5} if shape.dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        plain = chain(*args, positions=positions)
        for label, out in results.items():
            zeros = (out == 0).float().mean().item()
            assert abs(zeros - 0.1) < 0.002, f"{label} drops {zeros:.4f}"
            torch.testing.assert_close(out[out != 0], plain[out != 0] / 0.9, **rounding)

    naive = partial(lambda tokens, table: F.dropout(chain(tokens, table, positions=positions), 0.1))
    implementations = {"naive": naive, "fused": partial(embedding, dropout_p=0.1)}
    compare(implementations, args, bytes_moved=2 * row_bytes(shape), check=check)


@pytest.mark.parametrize("shape", [shapes.EMBEDDING_BASE], ids=str)
def bench_embedding_forward_backward(compare, shape, device):
    args, exact_positions = make(shape, device, grad=True)
    naive = partial(chain, positions=exact_positions.to(shape.dtype))
    implementations = {"naive": forward_backward(naive), "fused": forward_backward(embedding)}
    table_bytes = shape.vocabulary * shape.width * shape.dtype.itemsize
    exact_chain = forward_backward(partial(chain, positions=exact_positions))
    exact = partial(lambda tokens, table: exact_chain(tokens, table.detach().double().requires_grad_()))
    work = {"bytes_moved": 3 * row_bytes(shape) + table_bytes, "flops": 4 * numbers(shape)}
    compare(implementations, args, exact=exact, **work)
