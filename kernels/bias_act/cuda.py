"""Bias, activation and dropout in CUDA C++, for tensors on a GPU; see csrc/bias_act."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.bias_act import native

_C = _cuda.library()


def refuses(x, *_args) -> str | None:
    return _cuda.refuses_tensors(x=x)  # the bias was checked against x


def forward(x, *args):
    with _cuda.current(x):
        return native.forward(_cuda.on_current_stream(_C.bias_act_forward_cuda, x), x, *args)


def backward(dy, saved, *args):
    with _cuda.current(saved):
        launch = _cuda.on_current_stream(_C.bias_act_backward_cuda, saved)
        return native.backward(launch, _parts, dy, saved, *args)


def _parts(x: Tensor) -> int:
    return _C.bias_act_backward_parts_cuda(*x.shape, x.element_size(), _cuda.multiprocessors(x.device))
