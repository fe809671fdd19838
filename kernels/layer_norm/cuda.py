"""Layer norm in CUDA C++, for tensors on a GPU; see csrc/layer_norm."""

from __future__ import annotations

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.layer_norm import native

_C = _cuda.library()


def refuses(x, *_args) -> str | None:
    return _cuda.refuses_tensors(x=x)  # the other tensors were checked against x


def forward(x, *args):
    with _cuda.current(x):
        return native.forward(_cuda.on_current_stream(_C.layer_norm_forward_cuda, x), x, *args)


def backward(dy, dtotal, total, *args):
    cols = total.shape[-1]
    parts = _C.layer_norm_backward_parts_cuda(total.numel() // cols, cols, _cuda.multiprocessors(total.device))
    with _cuda.current(total):
        launch = _cuda.on_current_stream(_C.layer_norm_backward_cuda, total)
        return native.backward(launch, parts, dy, dtotal, total, *args)
