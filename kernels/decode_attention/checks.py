"""What the arguments of decode_attention must be; the numbers in lengths and rows are the backends' to check."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_transformer.kernels._checks import FLOATS, dense_last, require, require_float, require_same, require_shape

_INTEGERS = (torch.int32, torch.int64)


def checked(q, k_cache, v_cache, lengths, rows, causal, scale) -> tuple:
    """What a backend takes, but for wants_lse."""
    if not _fit(q, k_cache, v_cache):
        _say_what_does_not_fit(q, k_cache, v_cache)
    batch, capacity = q.shape[0], k_cache.shape[2]
    if lengths is not None:
        lengths = _check_integers("lengths", lengths, q)
        require_shape("lengths", lengths, (batch,))
    if rows is not None:
        rows = _check_integers("rows", rows, q)
        shape = tuple(rows.shape)
        if shape not in ((batch,), (batch, capacity)):
            raise ValueError(f"rows must have shape (B,) = ({batch},) or (B, C) = ({batch}, {capacity}), got {shape}")
        require(k_cache.shape[0] > 0 or batch == 0, "rows are given, but the cache has none")
    elif k_cache.shape[0] != batch:
        got = f"{k_cache.shape[0]} and {batch}"
        raise ValueError(f"without rows the cache has one row for each sequence of q, got {got}")
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    return dense_last(q), k_cache, v_cache, lengths, rows, bool(causal), scale


def _fit(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether there is nothing to say about them: a decoding step asks at every layer, and sentences take time."""
    if not (isinstance(q, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)):
        return False
    shape, cached = q.shape, k_cache.shape
    return (
        len(shape) == len(cached) == 4
        and cached == v_cache.shape
        and cached[3] == shape[3]
        and cached[1] > 0
        and shape[1] % cached[1] == 0
        and q.dtype is k_cache.dtype is v_cache.dtype
        and q.dtype in FLOATS
        and q.device == k_cache.device == v_cache.device
        and (cached[3] <= 1 or k_cache.stride(3) == v_cache.stride(3) == 1)
    )


def _say_what_does_not_fit(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    require_float(**tensors)
    require_same("dtype", **tensors)
    require_same("device", **tensors)
    for name, x in tensors.items():
        axes = "(B, H, L, D)" if x is q else "(R, H_k, C, D)"
        require(x.dim() == 4, f"{name} must have shape {axes}, got {tuple(x.shape)}")
        require(
            x is q or x.shape[-1] <= 1 or x.stride(-1) == 1,
            f"{name} must be contiguous along its last axis, got strides {x.stride()}: a cache is never copied",
        )
    require(
        k_cache.shape == v_cache.shape,
        f"k_cache and v_cache must have the same shape, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}",
    )
    require(
        q.shape[-1] == k_cache.shape[-1],
        f"q and k_cache must agree in head width, got {q.shape[-1]} and {k_cache.shape[-1]}",
    )
    heads, k_heads = q.shape[1], k_cache.shape[1]
    require(
        k_heads > 0 and heads % k_heads == 0,
        f"the heads of q must be a multiple of those of the cache, got {heads} and {k_heads}",
    )


def _check_integers(name: str, x: Tensor, q: Tensor) -> Tensor:
    """x with a contiguous last axis, if it can be numbers of this op at all; its values are the backend's to check."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dtype = str(x.dtype).removeprefix("torch.")
    require(x.dtype in _INTEGERS, f"{name} must be int32 or int64, got {dtype}")
    require(x.device == q.device, f"{name} must be on {q.device}, as q is, got {x.device}")
    return dense_last(x) if x.dim() else x
