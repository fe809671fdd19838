"""The choice of a beam search's next tokens, against log_softmax and topk of torch.

Bytes: the logits, read once. Operations, an element: two to find the maximum and the largest, difference, exp and sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bench import shapes
from fused_transformer.kernels import log_softmax_top_k


@dataclass(frozen=True)
class Step:
    """Logits of `sentences` sentences of `beams` hypotheses over a vocabulary of V; beam search keeps 2 · beams."""

    model: str
    sentences: int
    beams: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} B{self.sentences} beams{self.beams} V{self.vocabulary}{shapes.suffix(self.dtype)}"

    @property
    def rows(self) -> int:
        return self.sentences * self.beams

    @property
    def elements(self) -> int:
        return self.rows * self.vocabulary

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


SHAPES = [
    shapes.here(Step("transformer-base", 64, 4, 32000)),
    shapes.here(Step("transformer-base", 64, 4, 32000, dtype=torch.bfloat16)),
    Step("transformer-base", 1, 4, 32000),  # one sentence: rows are cut, or a GPU has little to do
    shapes.here(Step("transformer-small", 64, 4, 8000)),
    Step("llama-3", 1, 8, 128256, dtype=torch.bfloat16),
]


def implementations(shape: Step) -> dict:
    """The values alone: where two are equal, torch's topk does not say which it takes."""
    k = 2 * shape.beams

    def naive(logits, addend):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        values = torch.log_softmax(logits, -1, dtype=dtype) + addend[:, None]
        return values.view(shape.sentences, -1).topk(k).values

    def fused(logits, addend):
        return log_softmax_top_k(logits, k, beams=shape.beams, addend=addend)[0]

    return {"naive": naive, "fused": fused}


def make(shape: Step, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (2 * torch.randn(shape.rows, shape.vocabulary, device=device)).to(shape.dtype)
    return logits, -8 + torch.randn(shape.rows, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_log_softmax_top_k(compare, shape, device):
    compare(implementations(shape), make(shape, device), bytes_moved=shape.bytes, flops=5 * shape.elements)
