"""Projection and loss of a language model, forward and backward: in chunks, against all the logits at once.

The baselines are F.cross_entropy of F.linear, our own cross_entropy of it, and torch.compile of the first. Operations:
the three products. Bytes: hidden states and weights read, and their gradients written, once each. What each holds at
most beyond its inputs is recorded; at Transformer-base's size ours must be at most a fifth of the naive one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import packages, shapes
from bench.agreement import forward_backward
from bench.baselines import compiled
from fused_transformer.kernels import cross_entropy, linear_cross_entropy, matmul
from tests.memory import peak_bytes

SMOOTHING = 0.1


@dataclass(frozen=True)
class Tokens:
    """N tokens' hidden states of width E, projected on a vocabulary of V."""

    model: str
    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} N{self.tokens} E{self.width} V{self.vocabulary}{shapes.suffix(self.dtype)}"

    @property
    def flops(self) -> int:
        return 6 * self.tokens * self.width * self.vocabulary

    @property
    def bytes(self) -> int:
        return 2 * (self.tokens + self.vocabulary) * self.width * self.dtype.itemsize


BASE = shapes.here(Tokens("transformer-base", 2048, 512, 32000))
BASE_BF16 = shapes.here(Tokens("transformer-base", 2048, 512, 32000, dtype=torch.bfloat16))
SMALL = shapes.here(Tokens("transformer-small", 2048, 256, 8000))
SHAPES = [BASE, BASE_BF16, SMALL]


def torchs(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, label_smoothing=SMOOTHING)


def ours_unchunked(hidden, weight, targets):
    return cross_entropy(F.linear(hidden, weight), targets, label_smoothing=SMOOTHING, inplace_backward=True)


def fused(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, None, targets, label_smoothing=SMOOTHING)


def make(shape: Tokens, device: str):
    hidden = torch.randn(shape.tokens, shape.width).to(device, shape.dtype).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.width) * shape.width**-0.5).to(device, shape.dtype).requires_grad_()
    return hidden, weight, torch.randint(0, shape.vocabulary, (shape.tokens,)).to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_cross_entropy_forward_backward(compare, shape, device):
    if device == "cpu" and shape.dtype.itemsize == 2 and not matmul.onednn_multiplies(shape.dtype):
        pytest.skip(f"torch would multiply {shape.dtype} for minutes here: see the rows of bench_linear.py")
    args = make(shape, device)
    functions = {"naive": torchs, "cross_entropy": ours_unchunked, "fused": fused}
    peaks = {label: peak_bytes(partial(backward, function, args), device) for label, function in functions.items()}
    if device == "cpu" and shape is BASE:
        assert peaks["fused"] <= peaks["naive"] / 5, peaks
    chosen = {label: forward_backward(function) for label, function in functions.items()}
    if shape is BASE:
        chosen["compile"] = forward_backward(compiled(torchs))
    chosen |= packages.linear_cross_entropy(device, forward_backward, label_smoothing=SMOOTHING)
    compare(chosen, args, bytes_moved=shape.bytes, flops=shape.flops, peaks=peaks)


def backward(function, args) -> None:
    """The gradients, dropped: what is held at most is what counts."""
    torch.autograd.grad(function(*args), args[:2])
