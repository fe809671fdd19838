"""What decides the course of a training, beside model and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

# What the products are computed in; weights, gradients, norms, the loss and the optimizer are float32 in each.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides the course of a training, beside model and text; the defaults are the paper's.

    Args:
        max_tokens: of a batch on each side, padding included.
        accumulate: batches whose gradients make one step; the loss is the mean over all their target tokens.
        warmup_steps, learning_rate_factor: of the schedule, see `NoamLR`.
        label_smoothing: ε, in torch's convention, see `smoothed_cross_entropy`.
        clip_norm: the gradient's norm is cut to this; 0 leaves it.
        precision: "float32", or autocast's "bfloat16" or, on a GPU, "float16" with a scaled loss.
        pool_size: sentences sorted by length together, see `TokenBatches`.
        seed: of weights, dropout and the order of the batches.

    Raises:
        TypeError: a number that must be whole is no int.
        ValueError: a number out of range, or an unknown precision.
    """

    max_tokens: int = 25000
    accumulate: int = 1
    warmup_steps: int = 4000
    learning_rate_factor: float = 1.0
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"
    pool_size: int = 8192
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "accumulate", "warmup_steps", "pool_size", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        for name in ("max_tokens", "accumulate", "warmup_steps", "learning_rate_factor", "pool_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if not self.clip_norm >= 0.0:
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: TrainingOptions) -> list[str]:
        """ "name: mine, theirs" for each option that differs."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [f"{name}: {mine}, {theirs}" for name, mine, theirs in pairs if mine != theirs]
