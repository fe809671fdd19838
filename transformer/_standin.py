"""Temporary: plain torch in place of ops that are being written. Deleted as soon as they are on main."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(x, weight=None, bias=None, *, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_with_total(x, residual, weight=None, bias=None, *, x_bias=None, eps=1e-5, dropout_p=0.0, seed=None):
    x = x if x_bias is None else x + x_bias
    total = residual + F.dropout(x, dropout_p)
    return layer_norm(total, weight, bias, eps=eps), total


def add_layer_norm(x, residual, weight=None, bias=None, **kw):
    return add_layer_norm_with_total(x, residual, weight, bias, **kw)[0]


def sinusoidal_positions(length, width, *, layout="interleaved", start=0, dtype=torch.float32, device=None):
    p = torch.arange(start, start + length, device=device, dtype=torch.float64)[:, None]
    half = (width + 1) // 2
    i = torch.arange(half, device=device, dtype=torch.float64)
    exponent = -i / max(width // 2 - 1, 1) if layout == "concat_t2t" else -2 * i / width
    angle = p * 10000.0**exponent
    if layout == "interleaved":
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]
    else:
        table = torch.cat([angle.sin(), angle.cos()], -1)[:, :width]
    return table.to(dtype)


def embedding(
    tokens,
    table,
    *,
    positions="interleaved",
    scale=None,
    start=0,
    position_ids=None,
    padding_idx=None,
    dropout_p=0.0,
    seed=None,
):
    width = table.shape[-1]
    out = F.embedding(tokens, table) * (width**0.5 if scale is None else scale)
    if positions is not None:
        out = out + sinusoidal_positions(
            tokens.shape[-1], width, layout=positions, start=start, dtype=table.dtype, device=table.device
        )
    if padding_idx is not None:
        out = out.masked_fill((tokens == padding_idx)[..., None], 0.0)
    return F.dropout(out, dropout_p)
