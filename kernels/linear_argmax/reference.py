"""linear_argmax in plain torch: the meaning the native one is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels.linear import linear


def refuses(*_args) -> None:
    return None


def forward(x: Tensor, layer) -> tuple[Tensor, Tensor]:
    y = linear(x, layer.linear)
    values = y.amax(-1)
    found = (y == values[:, None]) | y.isnan()
    return values, found.to(torch.uint8).argmax(-1)
