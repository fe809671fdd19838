"""Layer norm written from the paper in plain torch: the meaning every other backend is tested against.

Any device, any float dtype. The sum is rounded to the dtype of x after every step, as eager torch does; statistics
and normalisation are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _philox


def refuses(*_args) -> None:
    return None


def forward(x, residual, x_bias, weight, bias, seed, eps, dropout_p, rms, keep_total, keep_statistics):
    total = x
    if x_bias is not None:
        total = total + x_bias.to(x.dtype)
    if seed is not None:
        total = _dropped(total, dropout_p, seed)
    if residual is not None:
        total = residual + total

    values = _wide(total)
    mean = torch.zeros_like(values[..., 0]) if rms else values.mean(-1)
    centred = values - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    kept = (None if rms else mean, rstd) if keep_statistics else (None, None)
    return y.to(x.dtype).contiguous(), None if total is x or not keep_total else total.contiguous(), *kept


def backward(dy, dtotal, total, weight, mean, rstd, seed, dropout_p, rms, param_dtype, wanted):
    values = _wide(total)
    dresidual = torch.zeros_like(values) if dtotal is None else _wide(dtotal)
    dweight = dbias = None
    if dy is not None:
        dy = _wide(dy)
        normal = (values if rms else values - mean[..., None]) * rstd[..., None]
        g = dy if weight is None else dy * weight
        inner = g - normal * (g * normal).mean(-1, keepdim=True)
        if not rms:
            inner = inner - g.mean(-1, keepdim=True)
        dresidual = dresidual + inner * rstd[..., None]
        dweight = _sum_rows(dy * normal) if wanted.dweight else None
        dbias = _sum_rows(dy) if wanted.dbias else None
    dx = dresidual if seed is None else _dropped(dresidual, dropout_p, seed)
    dx_bias = _sum_rows(dx) if wanted.dx_bias else None
    sums = (s if s is None else s.to(param_dtype) for s in (dx_bias, dweight, dbias))
    return dx.to(total.dtype) if wanted.dx else None, dresidual.to(total.dtype) if wanted.dresidual else None, *sums


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def _dropped(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """x / (1 - p), and 0 where dropped, whatever x holds there; rows are numbered over all leading axes."""
    cols = x.shape[-1]
    keep = _philox.keep_rows(seed, dropout_p, x.numel() // cols, cols).view(x.shape)
    return torch.where(keep, x * _philox.keep_scale(dropout_p), 0)
