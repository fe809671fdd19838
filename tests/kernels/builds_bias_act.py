"""The calls of bias_act that tests/offline.py compiles: each activation and dtype, with and without dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fused_transformer.kernels import bias_act

ROWS = 4096


def act(cols: int, dtype: torch.dtype, activation: str, dropout_p: float = 0.0, rows: int = ROWS) -> None:
    x, bias = (torch.empty(*shape, dtype=dtype, requires_grad=True) for shape in ((rows, cols), (cols,)))
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    y = bias_act(x, bias, activation=activation, dropout_p=dropout_p, seed=seed)
    y.backward(torch.empty_like(y))


JOBS: dict[str, Callable[[], object]] = {}
for _dtype in (torch.bfloat16, torch.float32, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    JOBS[f"relu 2048 {_name}"] = partial(act, 2048, _dtype, "relu")
    JOBS[f"gelu 2048 dropout {_name}"] = partial(act, 2048, _dtype, "gelu", 0.1)
    if _dtype != torch.float16:  # whose code differs from bfloat16's by conversions alone
        JOBS[f"relu 2048 dropout {_name}"] = partial(act, 2048, _dtype, "relu", 0.1)
        JOBS[f"gelu 2048 {_name}"] = partial(act, 2048, _dtype, "gelu")
        JOBS[f"gelu_tanh 2048 {_name}"] = partial(act, 2048, _dtype, "gelu_tanh")
        JOBS[f"relu 100 {_name}"] = partial(act, 100, _dtype, "relu")  # columns that fill no strip

_ROWS = (1, 2, 3, 7, 13, 16, 31, 32, 64, 97, 127, 128, 256, 509, 512, 1000, 1024, 4096, 8191, 65536)


def vary(index: int) -> None:
    """The same call with another number of rows."""
    act(2048, torch.bfloat16, "gelu", 0.1, _ROWS[index])
