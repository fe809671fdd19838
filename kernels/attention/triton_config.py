"""Tile sizes of attention's Triton kernels, by GPU, dtype, direction and head width.

HOPPER's for heads up to 128 are those that were fastest on an H200 (`python -m bench.tune`, bfloat16, 128 and 2,048
tokens, with and without a causal mask). The others are chosen without a GPU, by what ptxas says of each (bench/results/
triton_builds.json): no spills in the loops over whole tiles, products on tensor cores and not serialized, shared memory
within the GPU's; which of those that fit is fastest is for a GPU to say. Tiles depend on the kinds of masks too, but on
nothing else: neither batch nor length changes a row's bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_transformer.kernels import _triton


@dataclass(frozen=True)
class Config:
    m: int  # queries of a tile
    n: int  # keys of a tile
    warps: int
    stages: int  # of the pipeline that copies tiles from global to shared memory
    registers: int | None = None  # a thread's at most


# Lines are the widest head that they serve, then the tiles. 9.x and 10.x, 227 KB of shared memory: 128 rows are two
# groups of four warps with the 64 rows that one wgmma takes.
HOPPER = {
    "forward": {
        64: Config(128, 64, 8, 3, registers=128),  # so that two programs share a multiprocessor
        128: Config(64, 64, 4, 3),  # 128 x 64 of 8 warps took 4 to 26 % longer
        256: Config(128, 32, 8, 2),
    },
    "forward with scores": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    # 128 x 64 of 8 warps took 23 to 78 % longer at 64, and with two stages 4 to 27 % longer at 128
    "dq": {64: Config(64, 32, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    # Two accumulators of n keys · head width: they fill the registers from 128 keys of 128 on. At 64 twice the keys and
    # warps took 7 to 40 % longer.
    "dkdv": {64: Config(64, 64, 4, 2), 128: Config(64, 128, 8, 3), 256: Config(32, 64, 8, 2)},
    "tile": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 4, 1)},
}
# mma.sync, whose operands are in registers too: smaller tiles; within the 99 KB of 8.6, 8.9 and 12.x.
AMPERE = {
    "forward": {64: Config(128, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    # 128 queries by 64 would spill 137 to 207 times a tile
    "forward with scores": {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
    "dq": {64: Config(64, 32, 4, 3), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 4, 1)},
    "dkdv": {64: Config(32, 64, 4, 3), 128: Config(32, 64, 4, 2), 256: Config(16, 64, 8, 2)},
    "tile": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 4, 1)},
}
# Products outside tensor cores, whose operands a thread holds for the whole head width.
FLOAT32 = {
    "forward": {64: Config(32, 32, 4, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 32, 8, 1)},
    "forward with scores": {64: Config(32, 32, 4, 1), 128: Config(16, 64, 8, 1), 256: Config(16, 32, 8, 1)},
    "dq": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "tile": {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
}


def config(kernel: str, q: Tensor) -> Config:
    """The tiles of a kernel.

    kernel: "forward"; "forward with scores", where a tile of keep, bias or dropout takes registers too; "dq"; "dkdv";
        or "tile", for those that own a tile of scores: dbias and weights.
    """
    sixteen_bits = HOPPER if _triton.capability(q.device)[0] in (9, 10) else AMPERE
    table = FLOAT32 if q.dtype == torch.float32 else sixteen_bits
    return next(line for width, line in table[kernel].items() if q.shape[-1] <= width)
