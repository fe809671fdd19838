"""Self-attention of q, k and v that lie side by side, as one product made them: on a CPU one call does all of it.

A short sequence's time is what goes on around the kernel; this is the way that spares most of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fused_transformer.kernels import _native, _philox
from fused_transformer.kernels._autograd import once_differentiable
from fused_transformer.kernels.attention import reference
from fused_transformer.kernels.attention.mask import Causal, make_mask

Weights = Literal["each", "mean", None]


def thirds(qkv: Tensor, heads: int, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, H, L, D) each, without a copy."""
    first, second, width = qkv.shape
    parts = qkv.view(first, second, 3, heads, width // (3 * heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0) if batch_first else parts.permute(2, 1, 3, 0, 4).unbind(0)
    return q, k, v


def takes(qkv: Tensor, heads: int, differentiated: bool) -> bool:
    """Whether `forward` takes qkv, or `SelfAttention` where it is differentiated.

    On a CPU, what csrc/attention reads where it lies; its backward kernel writes float32 in whole vectors.
    """
    width = qkv.shape[2] // (3 * heads)
    return (
        qkv.is_cpu
        and (qkv.dtype == torch.float32 and width % 16 == 0 if differentiated else qkv.dtype in _native.DTYPES)
        and qkv.is_contiguous()
        and qkv.numel() > 0
        and width <= 256
        and not torch._C._is_any_autocast_enabled()
        and _native.available()
    )


@lru_cache(4096)
def _problem(shape: torch.Size, dtype: torch.dtype, heads: int, causal: bool, batch_first: bool) -> tuple:
    """What the directions share for all tensors of one shape, in the order of `OfQkv` in csrc/attention/bind.cpp."""
    batch, length, width = shape if batch_first else (shape[1], shape[0], shape[2])
    each = width // (3 * heads)
    return (batch, heads, length, each, batch_first, causal), _native.DTYPES[dtype], 1.0 / math.sqrt(each)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, int, float, int]:
    if dropout_p == 0.0 or seed is None:
        return 0.0, 0, 1.0, 0
    return dropout_p, _philox.threshold(dropout_p), _philox.keep_scale(dropout_p), seed.data_ptr()


def forward(
    qkv: Tensor,
    heads: int,
    causal: bool,
    weights: Weights,
    batch_first: bool,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out and the weights, if wanted; `lse`, (B, H, L), is written too."""
    shape, native = qkv.shape, _native.library()
    problem = _problem(shape, qkv.dtype, heads, causal, batch_first)
    batch, _, length, each, *_ = problem[0]
    out = qkv.new_empty((shape[0], shape[1], heads * each))
    floats, wanted, rows = native.attention_scratch("forward", each), None, batch * heads * length
    if weights is not None:
        floats = max(floats, native.attention_scratch("weights", each))
        size = (batch, heads, length, length) if weights == "each" else (batch, length, length)
        wanted = qkv.new_empty(size)
    # at its end what nobody keeps: the statistics, and each head's weights where their mean is wanted
    scratch = qkv.new_empty(floats + rows + (rows * length if weights == "mean" else 0), dtype=torch.float32)
    address = scratch.data_ptr()
    statistics = address + 4 * floats
    native.attention_of_qkv(
        problem,
        _dropout(dropout_p, seed),
        qkv.data_ptr(),
        out.data_ptr(),
        statistics if lse is None else lse.data_ptr(),
        statistics + 4 * rows if weights == "mean" else _native.ptr(wanted),
        _native.ptr(wanted) if weights == "mean" else 0,
        address,
    )
    return out, wanted


class SelfAttention(torch.autograd.Function):
    """`forward`; its gradient is one tensor, as qkv is."""

    @staticmethod
    def forward(ctx, qkv, heads: int, causal: bool, weights: Weights, batch_first: bool, dropout_p: float, seed):
        batch, length = qkv.shape[:2] if batch_first else qkv.shape[1::-1]
        lse = qkv.new_empty((batch, heads, length), dtype=torch.float32)
        out, wanted = forward(qkv, heads, causal, weights, batch_first, dropout_p, seed, lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, out, lse, seed)
        ctx.options = (heads, causal, batch_first, dropout_p)
        return out, wanted

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dweights):
        qkv, out, lse, seed = ctx.saved_tensors
        heads, causal, batch_first, dropout_p = ctx.options
        if dout is None:
            dqkv = torch.zeros_like(qkv)
        else:
            dout, dqkv = dout.contiguous(), torch.empty_like(qkv)
            problem = _problem(qkv.shape, qkv.dtype, heads, causal, batch_first)
            native = _native.library()
            scratch = qkv.new_empty(native.attention_scratch("backward", problem[0][3]), dtype=torch.float32)
            addresses = (x.data_ptr() for x in (qkv, out, lse, dout, dqkv, scratch))
            native.attention_of_qkv_backward(problem, _dropout(dropout_p, seed), *addresses)
        if dweights is not None:
            _add_gradient_of_weights(dqkv, dweights, qkv, lse, seed, ctx.options)
        return dqkv, None, None, None, None, None, None


def _add_gradient_of_weights(dqkv, dweights, qkv, lse, seed, options) -> None:
    heads, causal, batch_first, dropout_p = options
    (q, k, _), (dq, dk, _) = (thirds(x, heads, batch_first) for x in (qkv, dqkv))
    seen: Causal = "top_left" if causal else False
    masks = dict.fromkeys(("keep", "bias", "window", "k_lengths", "q_offsets", "k_offsets"))
    if dweights.dim() == 3:  # of the mean
        dweights = (dweights / heads)[:, None].expand(-1, heads, -1, -1)
    mask = make_mask(q, k, causal=seen, **masks)
    scale = 1.0 / math.sqrt(q.shape[-1])
    of_q, of_k, _ = reference.weights_backward(dweights, q, k, lse, mask, scale, dropout_p, seed, False)
    dq += of_q
    dk += of_k
