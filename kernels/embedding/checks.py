"""What the tokens and the table of an embedding must be; its positions are checked in positions.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import require, require_float


def check_tensors(tokens: Tensor, table: Tensor, padding_idx: int | None) -> int | None:
    """padding_idx counted from the table's beginning, if all three go together; an error in the caller's words."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a torch.Tensor, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be int32 or int64, got {tokens.dtype}")
    require_float(table=table)
    if table.dim() != 2:
        raise ValueError(f"table must have shape (V, E), got {tuple(table.shape)}")
    if tokens.device != table.device:
        raise ValueError(f"tokens must be on {table.device}, as table is, got {tokens.device}")
    if padding_idx is None:
        return None
    if not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx must be an int or None, got {type(padding_idx).__name__}")
    vocabulary = table.shape[0]
    fits = -vocabulary <= padding_idx < vocabulary
    require(fits, f"padding_idx must be within the vocabulary of {vocabulary}, got {padding_idx}")
    return padding_idx % vocabulary
