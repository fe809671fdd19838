"""Decode attention written from the formula in plain torch: the meaning every other backend is tested against.

Gathers each query's keys and values out of the cache, one query of the L after another. Any device, any float dtype.
Arithmetic is in the dtype of the inputs (statistics in float32, or float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Letters in einsums: b batch, h heads, c cached positions, d head width.


def refuses(*_args) -> None:
    return None


def forward(q, k_cache, v_cache, lengths, rows, causal: bool, scale: float, wants_lse: bool):
    batch, heads, queries, _ = q.shape
    cache_rows, heads_k, capacity, _ = k_cache.shape
    if lengths is None:
        lengths = torch.full((batch,), capacity, device=q.device)
    present = torch.arange(capacity, device=q.device) < lengths[:, None]  # (B, C)
    if q.device.type == "cpu":
        _check_values(lengths, rows, present, capacity, cache_rows)
    else:
        lengths = lengths.clamp(0, capacity)
        rows = None if rows is None else rows.clamp(0, cache_rows - 1)
    k, v = (_gather(cache, rows, present, heads // heads_k) for cache in (k_cache, v_cache))

    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=statistics, device=q.device)
    for i in range(queries):
        seen = lengths - (queries - 1 - i) if causal else lengths
        seen = (torch.arange(capacity, device=q.device) < seen[:, None])[:, None]  # (B, 1, C)
        scores = torch.einsum("bhd,bhcd->bhc", q[:, :, i], k) * scale
        scores = torch.where(seen, scores, -torch.inf).to(statistics)  # by selection: NaN in an unseen key is gone
        lse[:, :, i] = torch.logsumexp(scores, -1)
        shift = torch.where(lse[:, :, i] == -torch.inf, 0.0, lse[:, :, i])
        weights = torch.exp(scores - shift[..., None]).to(q.dtype)
        out[:, :, i] = torch.einsum("bhc,bhcd->bhd", weights, torch.where(seen[..., None], v, 0))
    return out, lse if wants_lse else None


def _gather(cache: Tensor, rows: Tensor | None, present: Tensor, group: int) -> Tensor:
    """(B, H, C, D): the keys or values of each sequence and query head."""
    if rows is not None and rows.dim() == 1:
        cache = cache[rows]
    elif rows is not None:
        positions = torch.arange(cache.shape[2], device=cache.device)
        rows = torch.where(present, rows, 0)  # what stands beyond the length may be anything
        cache = cache[rows, :, positions].transpose(1, 2)  # (B, C, H_k, D) -> (B, H_k, C, D)
    return cache if group == 1 else cache.repeat_interleave(group, dim=1)


def _check_values(lengths: Tensor, rows: Tensor | None, present: Tensor, capacity: int, cache_rows: int) -> None:
    """In the words of csrc/decode_attention/decode_attention.cpp."""
    for length in lengths.tolist():
        if not 0 <= length <= capacity:
            raise ValueError(f"lengths must be between 0 and {capacity}, got {length}")
    if rows is not None:
        for row in rows[present].tolist() if rows.dim() == 2 else rows.tolist():
            if not 0 <= row < cache_rows:
                raise ValueError(f"rows must be between 0 and {cache_rows - 1}, got {row}")
