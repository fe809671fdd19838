"""The calls of log_softmax_top_k that tests/offline.py compiles: beam search, greedy, and the most that is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fused_transformer.kernels import log_softmax_top_k


def search(dtype: torch.dtype, *, sentences: int = 16, beams: int = 4, k: int = 8, vocabulary: int = 32000) -> None:
    logits = torch.empty(sentences * beams, vocabulary, dtype=dtype)
    log_softmax_top_k(logits, k, beams=beams, addend=torch.empty(sentences * beams))


JOBS: dict[str, Callable[[], object]] = {}
for _dtype in (torch.bfloat16, torch.float32, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    JOBS[f"32000 4 beams {_name}"] = partial(search, _dtype)
    if _dtype == torch.bfloat16:  # the others differ in what is loaded, and not in what is done with it
        JOBS[f"32000 greedy {_name}"] = partial(search, _dtype, beams=1, k=1)
        JOBS[f"32000 most kept {_name}"] = partial(search, _dtype, beams=64, k=64)
        JOBS[f"50257 4 beams {_name}"] = partial(search, _dtype, vocabulary=50257)  # rows that begin anywhere
        JOBS[f"320 4 beams {_name}"] = partial(search, _dtype, vocabulary=320)  # a part is sorted whole

_SENTENCES = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 32, 61, 64, 100, 128, 255, 256, 1000)


def vary(index: int) -> None:
    """The same call with another number of sentences."""
    search(torch.bfloat16, sentences=_SENTENCES[index])
