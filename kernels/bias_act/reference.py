"""Bias, activation and dropout in plain torch: the meaning every other backend is tested against.

Any device, any float dtype; rounded to it after every step, as eager torch does. Activations and their derivatives are
torch's own, so that it costs what a model without a fused op pays; the tests judge it by the formulas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_transformer.kernels import _philox

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def refuses(*_args) -> None:
    return None


def forward(x, bias, seed, activation, dropout_p):
    h = _biased(x, bias)
    y = F.relu(h) if activation == "relu" else F.gelu(h, approximate=APPROXIMATE[activation])
    return (y if seed is None else _dropped(y, seed, dropout_p)).contiguous()


def backward(dy, saved, bias, seed, activation, dropout_p, wants_dx, wants_dbias):
    if activation == "relu":  # saved is y: 0 where the mask is, so that only the scale is missing
        scale = _philox.keep_scale(dropout_p)
        dx = torch.ops.aten.threshold_backward(dy if scale == 1.0 else dy * scale, saved, 0)
    else:
        dy = dy if seed is None else _dropped(dy, seed, dropout_p)
        dx = torch.ops.aten.gelu_backward(dy, _biased(saved, bias), approximate=APPROXIMATE[activation])
    dbias = None
    if wants_dbias:
        rows = dx.reshape(-1, dx.shape[-1])
        dbias = rows.sum(0, dtype=torch.float64 if dx.dtype == torch.float64 else torch.float32)
    return dx if wants_dx else None, dbias


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def _dropped(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """0 or x / (1 - p) for each element; rows are numbered over all leading axes."""
    cols = x.shape[-1]
    keep = _philox.keep_rows(seed, dropout_p, x.numel() // cols, cols).view(x.shape)
    return torch.where(keep, x * _philox.keep_scale(dropout_p), 0)
