"""Bias, activation and dropout in one pass against the chain written without a fused op, and torch.compile of it.

Bytes forward: x read, y written. With the gradient: also the upstream gradient and y (GELU: x) read, and dx written.
Operations, an element: two of ReLU (sum, maximum), five of GELU (its erf counts as one); backward two (mask, dbias) and
nine more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import shapes
from bench.agreement import forward_backward
from bench.baselines import compiled
from fused_transformer.kernels import bias_act
from fused_transformer.kernels.bias_act import has_kernel


@dataclass(frozen=True)
class Hidden:
    """The middle of a feed-forward network: M tokens of width F."""

    model: str
    activation: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} {self.activation} M{self.rows} F{self.width}{shapes.suffix(self.dtype)}"

    @property
    def bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    def flops(self, *, backward: bool = False) -> int:
        forward_of, backward_of = {"relu": (2, 2), "gelu": (5, 9)}[self.activation]
        return self.rows * self.width * (forward_of + backward_of * backward)


BASE = shapes.here(Hidden("transformer-base", "relu", 4096, 2048))
BASE_BF16 = shapes.here(Hidden("transformer-base", "relu", 4096, 2048, dtype=torch.bfloat16))
BERT = shapes.here(Hidden("bert-base", "gelu", 4096, 3072))
BERT_BF16 = shapes.here(Hidden("bert-base", "gelu", 4096, 3072, dtype=torch.bfloat16))
SHAPES = [BASE, BASE_BF16, BERT, BERT_BF16]
DROPOUT = 0.1


def chain(x, bias, *, activation, dropout_p=0.0):
    return F.dropout({"relu": F.relu, "gelu": F.gelu}[activation](x + bias), dropout_p)


def make(shape: Hidden, device: str, grad: bool = False):
    sizes = [(shape.rows, shape.width), (shape.width,)]
    return tuple(torch.randn(size, device=device).to(shape.dtype).requires_grad_(grad) for size in sizes)


def implementations(shape: Hidden, wrap=lambda function: function) -> dict:
    naive = partial(chain, activation=shape.activation)
    chosen = {"naive": wrap(naive), "fused": wrap(partial(bias_act, activation=shape.activation))}
    if shape is BASE:
        chosen["compile"] = wrap(compiled(naive))
    return chosen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_bias_act(compare, shape, device):
    compare(implementations(shape), make(shape, device), bytes_moved=2 * shape.bytes, flops=shape.flops())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_bias_act_forward_backward(compare, shape, device):
    args = make(shape, device, grad=True)
    work = {"bytes_moved": 5 * shape.bytes, "flops": shape.flops(backward=True)}
    compare(implementations(shape, forward_backward), args, **work)


@pytest.mark.parametrize("shape", [BASE_BF16], ids=str)
def bench_bias_act_dropout(compare, shape, device):
    """In training: dropout of 0.1. The masks differ, so what is compared is the share of zeros, and what is left."""
    args, activation = make(shape, device), shape.activation
    if not has_kernel(args[0], activation, DROPOUT):
        pytest.skip("no kernel takes these tensors, and a model would call torch's own dropout")
    plain = chain(*args, activation=activation).float()
    zeros = (plain == 0).float().mean().item()

    def check(results):
        for label, out in results.items():
            dropped = (out == 0).float().mean().item()
            assert abs(dropped - (zeros + (1 - zeros) * DROPOUT)) < 0.002, f"{label} leaves {dropped:.4f} zeros"
            torch.testing.assert_close(out[out != 0].float(), plain[out != 0] / (1 - DROPOUT), rtol=0.02, atol=1e-5)

    chosen = {
        "naive": partial(chain, activation=activation, dropout_p=DROPOUT),
        "fused": partial(bias_act, activation=activation, dropout_p=DROPOUT),
    }
    compare(chosen, args, bytes_moved=2 * shape.bytes, check=check)
