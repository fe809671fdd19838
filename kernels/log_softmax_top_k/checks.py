"""What the arguments of log_softmax_top_k must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import dense_last, require, require_float, require_same, require_shape


def checked(logits, k, beams, addend) -> tuple:
    """What a backend takes: rows of logits, dense along V, the addend dense in the dtype of the values, beams and k."""
    require_float(logits=logits, addend=addend)
    require_same("device", logits=logits, addend=addend)
    require(logits.dim() == 2, f"logits must have shape (R, V), got {tuple(logits.shape)}")
    rows, vocabulary = logits.shape
    beams, k = int(beams), int(k)
    require(beams >= 1 and rows % beams == 0, f"the rows must be a multiple of beams, got {rows} and {beams}")
    require(1 <= k <= beams * vocabulary, f"k must be between 1 and beams · V = {beams * vocabulary}, got {k}")
    require_shape("addend", addend, (rows,))
    if addend is not None:
        addend = addend.to(values_dtype(logits)).contiguous()
    return dense_last(logits), addend, beams, k


def values_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
