"""The dropout mask in plain torch, bit for bit the one that csrc/common/philox.h draws.

Philox 4x32-10 (Salmon et al. 2011). Element (outer, row, col) reads word col % 4 of the block with counter
(col // 4, row, outer, 0) and the seed as key; it is kept where the word is >= min(floor(p * 2**32), 2**32 - 1).
Because an element's bits depend on its position alone, forward, backward, every backend and every tiling
agree on the mask, and nothing is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """(1,) int64 drawn from torch's generator of `device`, so torch.manual_seed governs dropout."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_for(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed of a call that was given `seed`: None where nothing is dropped, a new one where none was given."""
    if dropout_p == 0.0:
        return None
    return new_seed(x.device) if seed is None else seed


def threshold(dropout_p: float) -> int:
    """A 32-bit word below this is dropped."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), and 0 at p = 1, where nothing is kept."""
    return 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


def _multiply_wide(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of x * factor, in int64 without overflow (16-bit halves of the factor)."""
    by_low, by_high = x * (factor & 0xFFFF), x * (factor >> 16)  # each below 2^48
    middle = (by_low >> 16) + (by_high & 0xFFFF)
    low = ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)
    return low, (by_high >> 16) + (middle >> 16)


def words(seed: Tensor, outer: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """The 32-bit words (as int64) of the elements at broadcastable int64 positions."""
    seed = seed.reshape(()).to(torch.int64)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(col // 4, row, outer, torch.zeros_like(col))
    for _ in range(10):
        low0, high0 = _multiply_wide(c0, 0xD2511F53)
        low1, high1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    lane = (col % 4).expand_as(c0)
    return torch.where(lane < 2, torch.where(lane == 0, c0, c1), torch.where(lane == 2, c2, c3))


def keep_mask(seed: Tensor, dropout_p: float, outer: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """bool, True where the element is kept; the positions are int64 and broadcast against each other."""
    return words(seed, outer, row, col) >= threshold(dropout_p)


def keep_rows(seed: Tensor, dropout_p: float, rows: int, cols: int) -> Tensor:
    """(rows, cols) bool: the mask of a row-wise op, where outer is 0."""
    device = seed.device
    row, col = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)[None, :]
    return keep_mask(seed, dropout_p, torch.zeros_like(row), row, col)
