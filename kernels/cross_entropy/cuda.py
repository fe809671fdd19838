"""Cross entropy in CUDA C++, for tensors on a GPU; see csrc/cross_entropy."""

from __future__ import annotations

import torch

from fused_transformer.kernels import _cuda
from fused_transformer.kernels._native import DTYPES, ptr

_C = _cuda.library()


def refuses(logits, *_args) -> str | None:
    return _cuda.refuses_tensors(logits=logits)


def forward(logits, targets, target_weight, every_weight, z_loss, ignore_index):
    rows, vocabulary = logits.shape
    losses, top, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    targets = targets.contiguous()
    with _cuda.current(logits):
        _cuda.on_current_stream(_C.cross_entropy_forward_cuda, logits)(
            *(ptr(logits), logits.stride(0), ptr(targets), ptr(losses), ptr(top), ptr(log_sum)),
            *(rows, vocabulary, ignore_index, target_weight, every_weight, z_loss),
            *(targets.dtype == torch.int64, DTYPES[logits.dtype]),
        )
    return losses, top, log_sum


def backward(dlosses, logits, targets, top, log_sum, target_weight, every_weight, z_loss, ignore_index, inplace):
    rows, vocabulary = logits.shape
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    targets = targets.contiguous()
    with _cuda.current(logits):
        _cuda.on_current_stream(_C.cross_entropy_backward_cuda, logits)(
            *(ptr(dlosses), dlosses.stride(0), ptr(logits), logits.stride(0), ptr(targets), ptr(top), ptr(log_sum)),
            *(ptr(dlogits), dlogits.stride(0), rows, vocabulary, ignore_index, target_weight, every_weight, z_loss),
            *(targets.dtype == torch.int64, DTYPES[logits.dtype]),
        )
    return dlogits
