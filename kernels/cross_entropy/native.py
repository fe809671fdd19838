"""What the CPU and CUDA backends of cross entropy have in common: outputs, and the compiled functions' arguments.

csrc/cross_entropy/cross_entropy.h says what these mean. Each backend passes the compiled function of its device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fused_transformer.kernels._native import DTYPES, ptr
from fused_transformer.kernels.memory import empty_result_like


def forward(launch: Callable, logits, targets, target_weight, every_weight, z_loss, ignore_index):
    rows, vocabulary = logits.shape
    losses, top, log_sum = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    targets = targets.contiguous()
    launch(
        *(ptr(logits), logits.stride(0), ptr(targets), ptr(losses), ptr(top), ptr(log_sum)),
        *(rows, vocabulary, ignore_index, target_weight, every_weight, z_loss),
        *(targets.dtype == torch.int64, DTYPES[logits.dtype]),
    )
    return losses, top, log_sum


def backward(
    launch: Callable, dlosses, logits, targets, top, log_sum, target_weight, every_weight, z_loss, ignore_index, inplace
):
    rows, vocabulary = logits.shape
    dlogits = logits if inplace else empty_result_like(logits)
    targets, top, log_sum = targets.contiguous(), top.contiguous(), log_sum.contiguous()
    launch(
        *(ptr(dlosses), dlosses.stride(0), ptr(logits), logits.stride(0), ptr(targets), ptr(top), ptr(log_sum)),
        *(ptr(dlogits), dlogits.stride(0), rows, vocabulary, ignore_index, target_weight, every_weight, z_loss),
        *(targets.dtype == torch.int64, DTYPES[logits.dtype]),
    )
    return dlogits
