"""Greedy search: the likeliest token, again and again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_transformer.deferred import Deferred, DeferringStep
from fused_transformer.hypotheses import NEVER, Hypotheses, OnTokens, Results
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.stepping import NAN, Step, check_lengths, next_logits

# Of what the step gave, logits (N, V) or hidden states, and the sentences (N,) at a position: log-probabilities (N,)
# and tokens (N,). None instead of log-probabilities: they are finite, and will be known later.
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor | None, Tensor]]


@torch.no_grad()
def search_greedy(
    step: Step,
    max_lengths: Tensor,
    *,
    scores: bool = True,
    bos_idx: int = 1,
    eos_idx: int = 2,
    padding_idx: int = 0,
    on_tokens: OnTokens | None = None,
) -> Hypotheses:
    """Append the likeliest token until it is eos or a sentence has max_lengths[b] tokens.

    Args:
        step: gives the logits of the next token, see `search.py`.
        max_lengths: (B,) int64, most tokens generated for each sentence, eos counted.
        scores: False: do without log-probabilities.
        bos_idx, eos_idx, padding_idx: the special tokens.
        on_tokens: told of each token.

    Returns:
        Hypotheses with N = 1; a score is the sum of the tokens' log-probabilities, eos counted. Without scores they are
        0, and -inf still where there is no hypothesis.

    Raises:
        ValueError: max_lengths or the logits have the wrong shape, or the logits hold NaN.
    """
    special = (bos_idx, eos_idx, padding_idx, on_tokens)
    if isinstance(step, DeferringStep):
        later = Deferred(step, scores=scores)
        found = later.complete(_follow(step.hidden, max_lengths, later.choose, *special))
    else:
        found = _follow(step, max_lengths, _likeliest, *special)
    if scores:
        return found
    return found._replace(
        scores=found.scores.masked_fill(found.scores > NEVER, 0.0), log_probs=torch.zeros_like(found.log_probs)
    )


def _likeliest(logits: Tensor, sentences: Tensor, position: int) -> tuple[Tensor, Tensor]:
    log_prob, token = log_softmax_top_k(logits, 1)
    return log_prob[:, 0], token[:, 0]


def _follow(
    step: Step,
    max_lengths: Tensor,
    choose: Choose,
    bos_idx: int,
    eos_idx: int,
    padding_idx: int,
    on_tokens: OnTokens | None,
) -> Hypotheses:
    """All sentences, each extended by one token a step until it has ended.

    A step of a model is followed by little here: at a batch of one each operation of torch takes 10 to 30 µs, since the
    model's weights have driven its code out of the caches. Whether anything ends is asked of Python's numbers.
    """
    check_lengths(max_lengths)
    results = Results(max_lengths, 1, padding_idx, on_tokens)
    sentences = torch.arange(max_lengths.numel(), device=max_lengths.device)
    prefixes = torch.full((len(sentences), 1), bos_idx, device=sentences.device)
    log_probs = _LogProbs(len(sentences), sentences.device)
    nearest = int(max_lengths.min()) if len(sentences) else 0
    parents = unmoved = sentences
    position = 0  # tokens that each prefix has behind bos
    while sentences.numel():
        logits = next_logits(step, prefixes, sentences, parents)
        log_prob, token = choose(logits, sentences, position)
        position += 1
        prefixes = torch.cat([prefixes, token[:, None]], 1)
        log_probs.append(log_prob)
        parents = unmoved
        tokens, likely = token.tolist(), [] if log_prob is None else log_prob.tolist()
        if math.isnan(sum(likely)):
            raise ValueError(NAN)
        if eos_idx in tokens or NEVER in likely or position >= nearest:
            finished = token == eos_idx
            scores = log_probs.sums()
            leaving = finished | (scores == NEVER) | (max_lengths[sentences] <= position)
            row, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
            results.store(
                sentences[row],
                prefixes[row, None, 1:],
                log_probs.of(row)[:, None],
                torch.full_like(row, position)[:, None],
                scores[row, None],
                finished[row, None],
            )
            sentences, parents, unmoved, prefixes = sentences[stay], parents[stay], unmoved[: len(stay)], prefixes[stay]
            log_probs.keep(stay)
            nearest = int(max_lengths[sentences].min()) if len(sentences) else 0
        if results.streaming:
            results.tell(sentences, prefixes[:, 1:], torch.full_like(sentences, position))
    return results.found


class _LogProbs:
    """Of each sentence's tokens (n, t); joined when asked for. Those that are known later are 0 here."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._joined = torch.zeros(count, 0, device=device, dtype=torch.float32)
        self._later: list[Tensor | None] = []

    def append(self, log_prob: Tensor | None) -> None:
        self._later.append(log_prob)

    def of(self, rows: Tensor) -> Tensor:
        return self._all()[rows]

    def keep(self, rows: Tensor) -> None:
        self._joined = self._all()[rows]

    def sums(self) -> Tensor:
        """(n,) float64: of hundreds; one after the other, whatever sentences are beside."""
        every = self._all().double()
        return every.cumsum(1)[:, -1] if every.shape[1] else every.sum(1)

    def _all(self) -> Tensor:
        if self._later:
            zeros = self._joined.new_zeros(len(self._joined))
            later = [zeros if log_prob is None else log_prob for log_prob in self._later]
            self._joined = torch.cat([self._joined, torch.stack(later, 1)], 1)
            self._later.clear()
        return self._joined
