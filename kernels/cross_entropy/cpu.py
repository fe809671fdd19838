"""Cross entropy in C++ with SIMD and OpenMP, for CPU tensors; see csrc/cross_entropy."""

from __future__ import annotations

from fused_transformer.kernels._native import library, refuses_tensors
from fused_transformer.kernels.cross_entropy import native

_C = library()


def refuses(logits, *_args) -> str | None:
    return refuses_tensors("cpu", logits=logits)


def forward(*args):
    return native.forward(_C.cross_entropy_forward, *args)


def backward(*args):
    return native.backward(_C.cross_entropy_backward, *args)
