"""What the compiled backends of attention, cpu.py and cuda.py, have in common: how a call's arguments reach C++."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels import _native, _philox
from fused_transformer.kernels.attention.mask import Mask

CAUSAL = {False: 0, "top_left": 1, "bottom_right": 2}
NO_SCORES = (0, 0, 0, 0, 0)


def refuses_width(q: Tensor) -> str | None:
    if q.shape[-1] > 256 or q.shape[-1] < 1:
        return f"the head width must be 1 ... 256, got {q.shape[-1]}"
    return None


def problem(q, k, v, mask: Mask, scale, dropout_p, seed) -> tuple:
    """The arguments that all directions share, in the order of `fill` in csrc/attention/bind.cpp."""
    heads_axis = 1
    sizes = (mask.batch, q.shape[heads_axis], k.shape[heads_axis], mask.q_length, mask.k_length, q.shape[-1])
    return (
        sizes,
        _native.DTYPES[q.dtype],
        rows(q),
        rows(k),
        rows(v),
        scale,
        scores(mask.keep),
        scores(mask.bias),
        0 if mask.bias is None else _native.DTYPES[mask.bias.dtype],
        CAUSAL[mask.causal],
        mask.window,
        (_native.ptr(mask.k_lengths), _native.ptr(mask.q_offsets), _native.ptr(mask.k_offsets)),
        dropout_p,
        _philox.threshold(dropout_p),
        _philox.keep_scale(dropout_p),
        _native.ptr(seed) if dropout_p > 0.0 else 0,
    )


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides (batch, head, row); packed tensors (T, H, ...) have no batch axis."""
    if x.dim() == 4:
        batch, head, row, _ = x.stride()
        return x.data_ptr(), batch, head, row
    row, head, _ = x.stride()
    return x.data_ptr(), 0, head, row


def statistics(x: Tensor) -> tuple[int, int, int, int]:
    """The same of what has no last axis: (B, H, L), or packed (T, H)."""
    if x.dim() == 3:
        return (x.data_ptr(), *x.stride())
    row, head = x.stride()
    return x.data_ptr(), 0, head, row


def scores(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """Address and strides of a 4-D mask, 0 along the axes that it broadcasts."""
    if x is None:
        return NO_SCORES
    return (x.data_ptr(), *(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)))
