"""log-softmax and top-k in CUDA C++, for tensors on a GPU; see csrc/log_softmax_top_k."""

from __future__ import annotations

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.log_softmax_top_k import native

_C = _cuda.library()


def refuses(logits, _addend, beams: int, k: int) -> str | None:
    return native.refuses_sizes(logits, beams, k) or _cuda.refuses_tensors(logits=logits)


def forward(logits, *args):
    with _cuda.current(logits):
        launch = _cuda.on_current_stream(_C.log_softmax_top_k_cuda, logits)
        return native.forward(launch, _C.log_softmax_top_k_parts_cuda(logits.shape[1]), logits, *args)
