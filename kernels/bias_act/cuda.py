"""Bias, activation and dropout in CUDA C++, for tensors on a GPU; see csrc/bias_act."""

from __future__ import annotations

from torch import Tensor

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.bias_act import native

_C = _cuda.library()

# The sums over rows are taken by about this many blocks a multiprocessor: as many as run at once, with 128 threads of
# up to 96 registers. Each group of rows costs F floats of traffic, written and read again, so a group has some rows.
BLOCKS_PER_MULTIPROCESSOR = 5
STRIP_BYTES = 2048  # of the columns of a block: 128 threads, 16 bytes each
FEWEST_ROWS = 8


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
    rows, cols = x.shape
    strips = -(-cols * x.element_size() // STRIP_BYTES)
    at_once = BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(x.device)
    return max(1, min(-(-rows // FEWEST_ROWS), at_once // strips))
