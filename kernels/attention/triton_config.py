"""Tile sizes of attention's Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    m: int  # queries of a tile
    n: int  # keys of a tile
    warps: int
    stages: int


def config(direction: str, q: Tensor) -> Config:
    if q.dtype == torch.float32:
        return Config(64, 32, 4, 2)
    return Config(128, 64, 4, 3)
