"""Tile sizes of attention's Triton kernels, by direction, dtype and head width.

Chosen without a GPU, by what ptxas says for sm_80, sm_90 and sm_100 (bench/results/triton_builds.json): accumulators
and scores in registers, shared memory within 163 KB. Which of those that fit is fastest is for a GPU to say.
"""

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


# The widest head that a line serves, then its tiles. float32 sums run outside tensor cores, where an operand is held
# in registers whole: tiles are small.
SIXTEEN_BITS = {
    "forward": {
        64: Config(128, 64, 4, 3),
        128: Config(128, 64, 8, 3),  # 8 warps: each group of four has the 64 rows that wgmma wants
        256: Config(64, 32, 4, 2),
    },
    "dq": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    # two accumulators of n keys × head
    "dkdv": {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 64, 8, 1)},
}
FLOAT32 = {
    "forward": {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    "dq": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    "dkdv": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
}


def config(direction: str, q: Tensor) -> Config:
    """The tiles of "forward", "dq", "dkdv" or what takes the tiles of dq ("dbias", "weights")."""
    table = FLOAT32 if q.dtype == torch.float32 else SIXTEEN_BITS
    lines = table.get(direction, table["dq"])
    return next(line for width, line in lines.items() if q.shape[-1] <= width)
