"""What every search asks of its arguments and of the step function's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
NAN = "the logits hold NaN, so no next token can be chosen"


@runtime_checkable
class RankedStep(Protocol):
    """A step function that wants to know how likely the hypotheses are: on that depends what is asked for next."""

    def rank_hypotheses(self, scores: Tensor) -> None:
        """Ahead of each call in a beam search: log-probabilities (b, beam_size) float64 of its rows."""


def gives_its_logits(step: Step) -> bool:
    """Whether it says (gives_its_logits = True) that its logits are new ones each time, to be written to."""
    return getattr(step, "gives_its_logits", False) is True


def next_logits(step: Step, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
    """step(...), of the shape it must have."""
    logits = step(prefixes, sentences, parents)
    if logits.dim() != 2 or logits.shape[0] != prefixes.shape[0]:
        raise ValueError(f"step must return logits ({prefixes.shape[0]}, V), got {tuple(logits.shape)}")
    return logits


def refuse_nan(log_probs: Tensor) -> None:
    """Called on the chosen few: where one logit is NaN, they are."""
    if log_probs.isnan().any():
        raise ValueError(NAN)


def check_lengths(max_lengths: Tensor) -> None:
    """max_lengths (B,) int64, at least 1."""
    if max_lengths.dim() != 1 or max_lengths.dtype != torch.int64:
        raise ValueError(f"max_lengths must be (B,) int64, got {tuple(max_lengths.shape)} {max_lengths.dtype}")
    if (max_lengths < 1).any():
        raise ValueError("max_lengths must be at least 1 for every sentence")
