"""log-softmax and top-k in C++ for the CPU, rows over threads; see csrc/log_softmax_top_k."""

from __future__ import annotations

from fused_transformer.kernels import _native
from fused_transformer.kernels.log_softmax_top_k import native

_C = _native.library()


def refuses(logits, _addend, beams: int, k: int) -> str | None:
    return native.refuses_sizes(logits, beams, k) or _native.refuses_tensors("cpu", logits=logits)


def forward(*args):
    return native.forward(_C.log_softmax_top_k, 1, *args)
