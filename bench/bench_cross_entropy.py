"""Cross entropy with label smoothing against log_softmax written out, F.cross_entropy and torch.compile of it.

Bytes: the logits read; with the gradient also read again, and their gradient written. Logits of 16 bits are taken in
float32 by all, as a training that is to converge does. Operations, an element: maximum, difference, exp, two sums; with
the gradient five more: difference, exp, the share of smoothing, the scale, and the target's part.
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
from fused_transformer.kernels import cross_entropy

SMOOTHING = 0.1


@dataclass(frozen=True)
class Logits:
    """N tokens' logits over a vocabulary of V."""

    model: str
    tokens: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} N{self.tokens} V{self.vocabulary}{shapes.suffix(self.dtype)}"

    @property
    def elements(self) -> int:
        return self.tokens * self.vocabulary

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


# Fewer tokens than the other benchmarks' 4,096: their logits alone would be half a gigabyte, and a gigabyte in float64.
BASE = shapes.here(Logits("transformer-base", 512, 32000))
BASE_BF16 = shapes.here(Logits("transformer-base", 512, 32000, dtype=torch.bfloat16))
SMALL = shapes.here(Logits("transformer-small", 2048, 8000))
LLAMA_BF16 = shapes.here(Logits("llama-3", 128, 128256, dtype=torch.bfloat16))
SHAPES = [BASE, BASE_BF16, SMALL, LLAMA_BF16]


def written_out(logits, targets):
    log_probabilities = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    expected = log_probabilities.gather(-1, targets[:, None])[:, 0]
    return -((1 - SMOOTHING) * expected + SMOOTHING * log_probabilities.mean(-1)).mean()


def torchs(logits, targets):
    return F.cross_entropy(logits.float(), targets, label_smoothing=SMOOTHING)


def make(shape: Logits, device: str, grad: bool = False):
    logits = 2 * torch.randn(shape.tokens, shape.vocabulary, device=device)
    targets = torch.randint(0, shape.vocabulary, (shape.tokens,))
    return logits.to(device, shape.dtype).requires_grad_(grad), targets.to(device)


def implementations(shape: Logits, wrap=lambda function: function) -> dict:
    fused = partial(cross_entropy, label_smoothing=SMOOTHING)
    chosen = {"naive": wrap(written_out), "F.cross_entropy": wrap(torchs), "fused": wrap(fused)}
    if shape is BASE:
        chosen["compile"] = wrap(compiled(torchs))
    return chosen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cross_entropy(compare, shape, device):
    compare(implementations(shape), make(shape, device), bytes_moved=shape.bytes, flops=5 * shape.elements)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cross_entropy_forward_backward(compare, shape, device):
    args = make(shape, device, grad=True)
    work = {"bytes_moved": 3 * shape.bytes, "flops": 10 * shape.elements}
    compare(implementations(shape, forward_backward), args, **work)
