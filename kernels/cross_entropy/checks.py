"""What the logits and targets of a cross entropy must be, and the weights that smoothing gives the words."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels._checks import require, require_float

REDUCTIONS = ("mean", "sum", "none")
SMOOTHINGS = ("uniform", "others")


def check_tensors(logits: Tensor, targets: Tensor) -> None:
    """TypeError or ValueError unless the two go together."""
    require_float(logits=logits)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {str(targets.dtype).removeprefix('torch.')}")
    if logits.dim() < 1 or logits.shape[-1] < 1 or logits.shape[:-1] != targets.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"logits must be (..., V) with V >= 1 and targets (...), got shapes {shapes}")
    if targets.device != logits.device:
        raise ValueError(f"targets must be on {logits.device}, as logits are, got {targets.device}")


def check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """IndexError if a target on the CPU is outside the vocabulary. A GPU's are not looked at: it would wait."""
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if outside.any():
        index = outside.nonzero()[0].tolist()
        where = f" at index {index}" if index else ""
        raise IndexError(
            f"targets holds {int(targets[tuple(index)])}{where}, outside the vocabulary of {vocabulary} "
            f"(0 ... {vocabulary - 1}), and it is not ignore_index ({ignore_index})"
        )


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def checked_options(vocabulary: int, label_smoothing: float, smoothing: str, z_loss: float, ignore_index: int) -> tuple:
    """What a backend takes after logits and targets: (a, b, z_loss, ignore_index) with q(v) = a·[v = target] + b."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing must be one of {', '.join(map(repr, SMOOTHINGS))}, got {smoothing!r}")
    return *_weights(vocabulary, float(label_smoothing), smoothing), float(z_loss), int(ignore_index)


def _weights(vocabulary: int, label_smoothing: float, smoothing: str) -> tuple[float, float]:
    if smoothing == "uniform":
        return 1.0 - label_smoothing, label_smoothing / vocabulary
    if vocabulary == 1:  # there are no others
        return 1.0, 0.0
    every = label_smoothing / (vocabulary - 1)
    target = 1.0 - label_smoothing - every
    require(target > -1e-12, f"label_smoothing leaves the target less than its share of {vocabulary} tokens")
    return max(target, 0.0), every
