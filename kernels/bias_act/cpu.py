"""Bias, activation and dropout in C++ with SIMD and OpenMP, for CPU tensors; see csrc/bias_act."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels._native import library, refuses_tensors
from fused_transformer.kernels.bias_act import native

_C = library()

# Rows whose gradients are summed one after another before the groups' sums are added up. Cut by the number of rows
# alone, so that the number of threads can't show in the result.
ROWS_PER_PART = 32
FEW_PARTS = 16


def refuses(x, *_args) -> str | None:
    return refuses_tensors("cpu", x=x)  # the bias was checked against x


def forward(*args):
    return native.forward(_C.bias_act_forward, *args)


def backward(*args):
    return native.backward(_C.bias_act_backward, _parts, *args)


def _parts(x: Tensor) -> int:
    return -(-len(x) // max(1, min(ROWS_PER_PART, len(x) // FEW_PARTS)))
