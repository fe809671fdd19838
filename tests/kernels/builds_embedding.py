"""The calls of embedding that tests/offline.py compiles: each dtype, positions looked up and computed, with dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fused_transformer.kernels import embedding

BEYOND_ANY_TABLE = 10**8  # a start from which positions are computed


def embed(
    width: int, dtype: torch.dtype, batch: int = 32, length: int = 128, dropout_p: float = 0.1, **options
) -> None:
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    table = torch.empty(10_000, width, dtype=dtype, requires_grad=True)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    out = embedding(tokens, table, dropout_p=dropout_p, seed=seed, **options)
    out.backward(torch.empty_like(out))


JOBS: dict[str, Callable[[], object]] = {}
for _dtype in (torch.bfloat16, torch.float32, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    JOBS[f"512 dropout {_name}"] = partial(embed, 512, _dtype, padding_idx=0)
    if _dtype != torch.float16:  # whose code differs from bfloat16's by conversions alone
        JOBS[f"512 positions computed {_name}"] = partial(embed, 512, _dtype, start=BEYOND_ANY_TABLE)
        JOBS[f"1024 {_name}"] = partial(embed, 1024, _dtype, dropout_p=0.0)
        JOBS[f"64 dropout {_name}"] = partial(embed, 64, _dtype)

_SHAPES = (  # the first has several chunks: one alone launches no kernel that merges them
    *((32, 512), (1, 1), (1, 2), (2, 1), (3, 7), (13, 16), (16, 16), (1, 31), (32, 32), (5, 64)),
    *((97, 3), (128, 1), (7, 128), (1, 509), (4, 1000), (1, 1024), (64, 63), (2, 8191), (256, 256), (31, 33)),
)


def vary(index: int) -> None:
    """The same call with another batch and length."""
    batch, length = _SHAPES[index]
    embed(512, torch.bfloat16, batch, length, start=torch.zeros(batch, dtype=torch.int64), padding_idx=1)
