"""Argument checks shared by the ops: each error names the argument as the caller wrote it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels.memory import empty_result_like

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def has_numbers(x: Tensor) -> bool:
    """Whether x holds numbers, which can be checked: false for meta tensors and what stands for a tensor in a trace."""
    return type(x) in PLAIN_TYPES and not x.is_meta


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_tensors(**tensors: Tensor | None) -> None:
    """Each that is given is a torch.Tensor, which a list of lengths is not."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def require_float(**tensors: Tensor | None) -> None:
    """Each tensor given is a torch.Tensor of one of the four float types."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            dtype = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype}")


def require_same(attribute: str, **tensors: Tensor | None) -> None:
    """All tensors given agree in `attribute` ("dtype" or "device")."""
    given = {name: getattr(x, attribute) for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name}: {str(value).removeprefix('torch.')}" for name, value in given.items())
        raise ValueError(f"all tensors must have the same {attribute}, got {listed}")


def require_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """x, if given, has exactly this shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def require_no_gradient(op: str, instead: str = "", /, **tensors: Tensor | None) -> None:
    """`op` has none, backward or forward: ValueError where one of the tensors asks for it."""
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not (backward or forward):
        return
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue  # None, or the op says so in its own words
        if backward and x.requires_grad:
            raise ValueError(f"{op} has no gradient, and {name} requires one: use torch.no_grad(){instead}")
        if forward and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"{op} has no forward-mode derivative, and {name} has a tangent")


def require_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """dropout_p is a probability, and the seed one int64 number on the tensors' device."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError("seed must be a torch.int64 tensor with one element")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, as the other tensors are, got {seed.device}")


def rows_for_packed(op: str, name: str, x: Tensor, columns: int) -> Tensor:
    """x (..., columns) float32 as rows that a kernel with packed weights takes, their last axis dense."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    # Each sentence is made only where it is said: that takes longer than a small product.
    shape = x.shape
    if not shape or shape[-1] != columns:
        raise ValueError(f"{name} must have shape (..., {columns}), got {tuple(shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {x.dtype}")
    if not x.is_cpu:
        raise ValueError(f"{name} must be on the CPU, where the packed weights are, got {x.device}")
    require_no_gradient(op, **{name: x})
    return dense_last(x if len(shape) == 2 else x.reshape(-1, columns))


def empty_rows_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like, but the last axis is contiguous in any case: not so where x overlaps itself (unfold)."""
    y = empty_result_like(x, dtype, contiguous=False)
    dense = y.shape[-1] <= 1 or y.stride(-1) == 1
    return y if dense else empty_result_like(x, dtype)


def dense_last(x: Tensor) -> Tensor:
    """x itself if its last axis is contiguous (the one thing kernels ask of strides), else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
