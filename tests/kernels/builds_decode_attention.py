"""Calls of decode_attention whose Triton kernels tests/offline.py compiles: every kernel, dtype and tile."""

from __future__ import annotations

from functools import partial

import torch

from fused_transformer.kernels import decode_attention_with_lse

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def step(dtype, *, B=8, H=8, Hk=8, L=1, C=128, D=64, rows=None, causal=True, lengths=True):
    """One decoding step. rows: None, "shared" (two sequences a row) or "table"."""
    q = torch.empty(B, H, L, D, dtype=dtype)
    cache = torch.empty(2, B, Hk, C, D, dtype=dtype)
    shape = {None: None, "shared": (B,), "table": (B, C)}[rows]
    return decode_attention_with_lse(
        q,
        *cache,
        torch.full((B,), C) if lengths else None,
        rows=None if shape is None else torch.zeros(shape, dtype=torch.int32),
        causal=causal,
    )


CALLS = {
    # one query of a key head
    "step": {},
    "step D=128": {"D": 128, "C": 4096},
    "step D=256": {"D": 256},
    "beams by table": {"rows": "table"},
    "step of a whole cache": {"lengths": False},
    # several
    "beams side by side": {"L": 4, "causal": False},
    "beams over a whole cache": {"L": 4, "causal": False, "lengths": False},
    "grouped queries D=128": {"B": 1, "H": 32, "D": 128, "C": 4096},
    "grouped queries by table": {"H": 32, "rows": "table"},
    "draft of grouped queries": {"B": 1, "H": 32, "L": 8},
    "draft of grouped queries D=128": {"B": 1, "H": 32, "L": 8, "D": 128, "C": 4096},
    "grouped queries D=256": {"B": 1, "H": 32, "D": 256},
}

JOBS = {
    f"{name} {str(dtype).removeprefix('torch.')}": partial(step, dtype, **call)
    for name, call in CALLS.items()
    for dtype in DTYPES
}

SIZES = (
    (3, 2, 1000), (1, 3, 4), (2, 2, 17), (5, 4, 31), (7, 3, 64), (16, 2, 128), (1, 2, 255), (64, 4, 256), (31, 2, 512),
    (2, 3, 513), (1, 4, 768), (4, 2, 1023), (8, 2, 1024), (13, 3, 1201), (1, 4, 4096), (17, 4, 5003), (2, 2, 16384),
    (1, 3, 20000), (1, 2, 70000), (6, 4, 2048),
)  # fmt: skip


def vary(index: int):
    """The same step of a model with grouped queries for another batch, number of queries and capacity.

    Of the number of queries it matters to the kernels whether it is 1, and whether there are more than 16 a key head.
    """
    batch, queries, capacity = SIZES[index]
    return step(torch.bfloat16, B=batch, H=32, Hk=8, L=queries, C=capacity, D=64, rows="table")
