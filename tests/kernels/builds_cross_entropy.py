"""The calls of cross entropy that tests/offline.py compiles: smoothed and not; a row in one tile, and in many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fused_transformer.kernels import cross_entropy

ROWS = 512


def loss(vocabulary: int, dtype: torch.dtype, label_smoothing: float = 0.1, rows: int = ROWS) -> None:
    logits = torch.empty(rows, vocabulary, dtype=dtype, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    cross_entropy(logits, targets, label_smoothing=label_smoothing).backward()


JOBS: dict[str, Callable[[], object]] = {}
for _dtype in (torch.bfloat16, torch.float32, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    JOBS[f"smoothed 32000 {_name}"] = partial(loss, 32000, _dtype)
    if _dtype != torch.float16:  # whose code differs from bfloat16's by conversions alone
        JOBS[f"32000 {_name}"] = partial(loss, 32000, _dtype, 0.0)
        JOBS[f"smoothed 50257 {_name}"] = partial(loss, 50257, _dtype)  # rows that begin anywhere: narrow loads
        JOBS[f"smoothed 320 {_name}"] = partial(loss, 320, _dtype)  # several rows a program

_ROWS = (1, 2, 3, 7, 13, 16, 31, 32, 64, 97, 127, 128, 256, 509, 512, 1000, 1024, 4096, 8191, 16384)


def vary(index: int) -> None:
    """The same call with another number of rows."""
    loss(32000, torch.bfloat16, rows=_ROWS[index])
