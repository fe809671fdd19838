"""The calls of layer norm that tests/offline.py compiles: each tile of the tables and each dtype, with most options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fused_transformer.kernels import add_layer_norm_with_total, layer_norm, rms_norm

ROWS = 4096


def add_norm(cols: int, dtype: torch.dtype, dropout_p: float = 0.0, rows: int = ROWS) -> None:
    """Residual, bias, weight and, if dropout_p, dropout; the total is kept, and has a gradient of its own."""
    x, residual = (torch.empty(rows, cols, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, x_bias = (torch.empty(cols, dtype=dtype, requires_grad=True) for _ in range(3))
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    y, total = add_layer_norm_with_total(x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p, seed=seed)
    torch.autograd.backward((y, total), (torch.empty_like(y), torch.empty_like(total)))


def norm(function: Callable, cols: int, dtype: torch.dtype, rows: int = ROWS) -> None:
    x, weight = (torch.empty(*shape, dtype=dtype, requires_grad=True) for shape in ((rows, cols), (cols,)))
    y = function(x, weight)
    y.backward(torch.empty_like(y))


JOBS: dict[str, Callable[[], object]] = {}
for _dtype in (torch.bfloat16, torch.float32, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    for _cols in (512, 1024):
        JOBS[f"add_layer_norm {_cols} dropout {_name}"] = partial(add_norm, _cols, _dtype, 0.1)
    if _dtype != torch.float16:  # whose code differs from bfloat16's by conversions alone
        for _cols in (64, 2048, 4096, 8192, 16384, 65536):
            JOBS[f"add_layer_norm {_cols} dropout {_name}"] = partial(add_norm, _cols, _dtype, 0.1)
        JOBS[f"layer_norm 512 {_name}"] = partial(norm, layer_norm, 512, _dtype)
        JOBS[f"rms_norm 512 {_name}"] = partial(norm, rms_norm, 512, _dtype)

_ROWS = (1, 2, 3, 7, 13, 16, 31, 32, 64, 97, 127, 128, 256, 509, 512, 1000, 1024, 4096, 8191, 65536)


def vary(index: int) -> None:
    """The same call with another number of rows."""
    add_norm(512, torch.bfloat16, 0.1, _ROWS[index])
