"""Greedy search whose log-probabilities are computed afterwards, many steps' at once.

Which token is the likeliest can be told from far less than all logits (`kernels.linear_argmax`); its log-probability
can't, as the sum over the vocabulary takes them all. But nothing in a greedy search waits for it. So the hidden states
are kept, and once there are enough of them one product gives their logits: the weights, which bound a step of few rows,
are read once for all of them.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fused_transformer.hypotheses import NEVER, Hypotheses
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.stepping import refuse_nan

ROWS = 64  # hidden states whose logits are computed together: 8 MB of them at V = 32,000


@runtime_checkable
class DeferringStep(Protocol):
    """A step function (see `search.py`) in parts: step(...) = project(hidden(...))."""

    def hidden(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        """(N, E) float32."""

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """The largest logit and its token, (N,) each; None where all logits cost no more."""

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (N, V)."""


class Deferred:
    """Chooses the likeliest token of each hidden state, and owes their log-probabilities until `complete`.

    Args:
        step: whose hidden states they are.
        scores: False: nobody will ask for them.
    """

    def __init__(self, step: DeferringStep, *, scores: bool = True) -> None:
        self.step, self.scores = step, scores
        self._owed: list[tuple[Tensor, Tensor, int]] = []  # hidden states, their sentences and position
        self._known: list[tuple[Tensor, Tensor, Tensor]] = []  # sentences, positions, log-probabilities

    def choose(self, hidden: Tensor, sentences: Tensor, position: int) -> tuple[Tensor | None, Tensor]:
        """Log-probabilities (N,), None where they are owed, and tokens (N,)."""
        found = self.step.likeliest(hidden)
        # Where a logit is not finite, all of them say what that means.
        if found is None or not all(map(math.isfinite, found[0].tolist())):
            log_prob, token = log_softmax_top_k(self.step.project(hidden), 1)
            return log_prob[:, 0], token[:, 0]
        if self.scores:
            self._owed.append((hidden, sentences, position))
            if sum(len(rows) for rows, _, _ in self._owed) >= ROWS:
                self._pay()
        return None, found[1]

    def complete(self, found: Hypotheses) -> Hypotheses:
        """The hypotheses with the log-probabilities that were owed, of which their scores are the sums."""
        self._pay()
        if not self._known:
            return found
        sentences, positions, log_probs = (torch.cat(parts) for parts in zip(*self._known, strict=True))
        there = found.scores[sentences, 0] > NEVER  # else it ended where there was no way on
        found.log_probs[sentences[there], 0, positions[there]] = log_probs[there]
        return found._replace(scores=torch.where(found.scores > NEVER, found.log_probs.double().sum(-1).float(), NEVER))

    def _pay(self) -> None:
        if not self._owed:
            return
        hidden = torch.cat([rows for rows, _, _ in self._owed])
        sentences = torch.cat([of for _, of, _ in self._owed])
        positions = torch.cat([torch.full_like(of, position) for _, of, position in self._owed])
        log_prob, _ = log_softmax_top_k(self.step.project(hidden), 1)
        refuse_nan(log_prob)
        self._known.append((sentences, positions, log_prob[:, 0]))
        self._owed.clear()
