"""Bias, activation and dropout in C++ with SIMD and OpenMP, for CPU tensors; see csrc/bias_act."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._native import library, refuses_tensors
from fused_transformer.kernels.bias_act import native

_C = library()


def refuses(x, *_args) -> str | None:
    return refuses_tensors("cpu", x=x)  # the bias was checked against x


def forward(*args):
    return native.forward(_C.bias_act_forward, *args)


def backward(*args):
    return native.backward(_C.bias_act_backward, _parts, *args)


def _parts(x: Tensor) -> int:
    return _C.row_parts(len(x))
