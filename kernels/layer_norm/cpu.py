"""Layer norm in C++ with SIMD and OpenMP, for CPU tensors; see csrc/layer_norm."""

from __future__ import annotations

from fused_transformer.kernels._native import library, refuses_tensors
from fused_transformer.kernels.layer_norm import native

_C = library()


def refuses(x, *_args) -> str | None:
    return refuses_tensors("cpu", x=x)  # the other tensors were checked against x


def forward(*args):
    return native.forward(_C.layer_norm_forward, *args)


def backward(dy, dtotal, total, *args):
    parts = _C.row_parts(total.numel() // total.shape[-1])
    return native.backward(_C.layer_norm_backward, parts, dy, dtotal, total, *args)
