"""What the native backends share: the results, the working memory, and how they are passed (bind.cpp)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_transformer.kernels import _native

# Tokens kept, and rows of a sentence: kMostKept and kMostBeams of csrc/log_softmax_top_k/log_softmax_top_k.h.
MOST = 64


def refuses_sizes(logits: Tensor, beams: int, k: int) -> str | None:
    """Why the native kernels do not take so many, or None."""
    if k > MOST or beams > MOST:
        return f"k and beams must be at most {MOST}, got {k} and {beams}"
    return None if logits.shape[1] < 2**31 else f"a row must have fewer than 2^31 columns, got {logits.shape[1]}"


def forward(launch: Callable[..., None], parts: int, logits, addend, beams: int, k: int):
    """launch: the native function. parts: into how many a row is cut."""
    rows, vocabulary = logits.shape
    sentences = rows // beams
    values = logits.new_empty((sentences, k), dtype=torch.float32)
    places = logits.new_empty((sentences, k), dtype=torch.int64)
    kept = logits.new_empty((rows, parts, 2, k), dtype=torch.int32)  # numbers, as bits, and tokens
    sums = logits.new_empty((rows, parts, 2), dtype=torch.float32)
    launch(
        (rows, vocabulary, beams, k),
        _native.DTYPES[logits.dtype],
        (logits.data_ptr(), logits.stride(0)),
        _native.ptr(addend),
        (values.data_ptr(), places.data_ptr()),
        (kept.data_ptr(), sums.data_ptr()),
    )
    return values, places
