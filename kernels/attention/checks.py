"""What q, k and v of the attention op must be; its masks are checked in mask.py."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._checks import FLOATS, dense_last, require, require_float, require_same


def check_tensors(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with contiguous last axes, if they fit each other; ValueError in the caller's words."""
    if not _fit(q, k, v, packed):
        _complain(q, k, v, packed)
    return dense_last(q), dense_last(k), dense_last(v)


def _fit(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> bool:
    """What `_complain` finds nothing wrong with, in few steps: most calls are right, and some take microseconds."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    q_shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    return (
        dtype in FLOATS
        and k.dtype == dtype
        and v.dtype == dtype
        and k.device == device
        and v.device == device
        and len(q_shape) == len(k_shape) == (3 if packed else 4)
        and k_shape == v.shape
        and q_shape[-1] == k_shape[-1]
        and (packed or q_shape[0] == k_shape[0])
        and k_shape[1] > 0
        and q_shape[1] % k_shape[1] == 0
    )


def _complain(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    require_float(q=q, k=k, v=v)
    require_same("dtype", q=q, k=k, v=v)
    require_same("device", q=q, k=k, v=v)
    axes = "(T, H, D), as q_offsets is given" if packed else "(B, H, L, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == (3 if packed else 4), f"{name} must have shape {axes}, got {tuple(x.shape)}")
    require(k.shape == v.shape, f"k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    require(q.shape[-1] == k.shape[-1], f"q and k must agree in head width, got {q.shape[-1]} and {k.shape[-1]}")
    require(packed or q.shape[0] == k.shape[0], f"q and k must agree in batch, got {q.shape[0]} and {k.shape[0]}")
    heads, k_heads = (q.shape[1], k.shape[1])
    require(
        k_heads > 0 and heads % k_heads == 0,
        f"the heads of q must be a multiple of those of k and v, got {heads} and {k_heads}",
    )


def check_statistics(q: Tensor, lse: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    """What `attention_weights` takes from the forward call."""
    require(tuple(lse.shape) == tuple(q.shape[:3]), f"lse must have shape {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    require(dropout_p == 0.0 or seed is not None, "attention_weights with dropout needs the seed of the forward call")
