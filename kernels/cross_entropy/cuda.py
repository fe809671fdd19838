"""Cross entropy in CUDA C++, for tensors on a GPU; see csrc/cross_entropy."""

from __future__ import annotations

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.cross_entropy import native

_C = _cuda.library()


def refuses(logits, *_args) -> str | None:
    return _cuda.refuses_tensors(logits=logits)


def forward(logits, *args):
    with _cuda.current(logits):
        return native.forward(_cuda.on_current_stream(_C.cross_entropy_forward_cuda, logits), logits, *args)


def backward(dlosses, logits, *args):
    with _cuda.current(logits):
        launch = _cuda.on_current_stream(_C.cross_entropy_backward_cuda, logits)
        return native.backward(launch, dlosses, logits, *args)
