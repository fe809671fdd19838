"""The operands of the products, as every backend gives them to torch."""

from __future__ import annotations

import torch
from torch import Tensor


def operand(x: Tensor | None, dtype: torch.dtype):
    """x in `dtype`; in 16 bits dense.

    torch's product of rows that lie apart may multiply what is between them by 0, and 0 · NaN is NaN (torch 2.13 on a
    processor with AMX: 33 rows of 5).
    """
    if x is None:
        return None
    return x.to(dtype).contiguous() if dtype.itemsize == 2 else x.to(dtype)
