"""What a search finds: the hypotheses it returns, and the tokens it tells of while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = float("-inf")  # the log-probability of a hypothesis that isn't one


class Hypotheses(NamedTuple):
    """The N best translations of B sentences, best first.

    tokens: (B, N, T) int64, without bos and eos, filled with padding_idx beyond each hypothesis' length.
    lengths: (B, N) int64. Where fewer than N hypotheses were found, the rest have length 0 and score -inf.
    scores: (B, N) float32: beam search's penalised log-probability for finished ones, else the log-probability.
    finished: (B, N) bool: the hypothesis ended with eos; False if it was cut at the maximum length.
    log_probs: (B, N, T) float32: the log-probability of each token, behind the last one that of eos where the
        hypothesis is finished, and 0 beyond.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    finished: Tensor
    log_probs: Tensor

    def tolist(self) -> list[list[list[int]]]:
        """The token numbers as lists: [sentence][rank][position]."""
        rows, lengths = self.tokens.tolist(), self.lengths.tolist()
        return [[row[:n] for row, n in zip(beams, ns, strict=True)] for beams, ns in zip(rows, lengths, strict=True)]


class NewTokens(NamedTuple):
    """Tokens that a step made certain: the best translation of their sentence will have them.

    A greedy search is certain of each token at once, beam search of what all hypotheses of a sentence have in common.
    (Only where the options forbid every way on does a sentence end without a translation, whatever was told.)

    sentences, positions, tokens: (n,) int64 each, ordered by sentence, then position; eos is not among them.
    done: (m,) int64, the sentences that ended with this step.
    """

    sentences: Tensor
    positions: Tensor
    tokens: Tensor
    done: Tensor


OnTokens = Callable[[NewTokens], object]


class Results:
    """Room for the hypotheses of all sentences, filled as they leave the search.

    Args:
        max_lengths: (B,) int64, most tokens of each sentence, eos counted.
        hypotheses: N.
        padding_idx: fills the tokens.
        on_tokens: told of every token as soon as it is certain.
    """

    def __init__(self, max_lengths: Tensor, hypotheses: int, padding_idx: int, on_tokens: OnTokens | None) -> None:
        batch, longest = max_lengths.numel(), int(max_lengths.max()) if max_lengths.numel() else 0
        device = max_lengths.device
        self.found = Hypotheses(
            tokens=max_lengths.new_full((batch, hypotheses, longest), padding_idx),
            lengths=max_lengths.new_zeros(batch, hypotheses),
            scores=torch.full((batch, hypotheses), NEVER, device=device, dtype=torch.float32),
            finished=torch.zeros(batch, hypotheses, dtype=torch.bool, device=device),
            log_probs=torch.zeros(batch, hypotheses, longest, device=device, dtype=torch.float32),
        )
        self._on_tokens = on_tokens
        self._told = max_lengths.new_zeros(batch)

    @property
    def streaming(self) -> bool:
        """Somebody wants to know what is certain."""
        return self._on_tokens is not None

    def store(
        self, sentences: Tensor, tokens: Tensor, log_probs: Tensor, lengths: Tensor, scores: Tensor, finished: Tensor
    ) -> None:
        """Sentences (b,) leave: tokens and log_probs (b, N, t), the others (b, N); lengths count eos."""
        finished = finished & (scores > NEVER)
        steps = torch.where(scores > NEVER, lengths, 0)
        lengths = steps - finished.long()
        found, width = self.found, tokens.shape[2]
        column = torch.arange(width, device=tokens.device)
        within = column < lengths[..., None]
        found.tokens[sentences, :, :width] = torch.where(within, tokens, found.tokens[sentences, :, :width])
        found.log_probs[sentences, :, :width] = torch.where(column < steps[..., None], log_probs.float(), 0.0)
        found.lengths[sentences], found.scores[sentences], found.finished[sentences] = lengths, scores.float(), finished
        if self.streaming:
            self._tell(sentences, tokens[:, 0], lengths[:, 0], sentences)

    def tell(self, sentences: Tensor, tokens: Tensor, certain: Tensor) -> None:
        """Of sentences (b,) that go on, the first certain[i] of tokens (b, t) will stay as they are."""
        if self.streaming:
            self._tell(sentences, tokens, certain, sentences[:0])

    def _tell(self, sentences: Tensor, tokens: Tensor, certain: Tensor, done: Tensor) -> None:
        assert self._on_tokens is not None
        position = torch.arange(tokens.shape[1], device=tokens.device)
        new = (self._told[sentences, None] <= position) & (position < certain[:, None])
        row, place = new.nonzero(as_tuple=True)
        self._told[sentences] = torch.maximum(self._told[sentences], certain)
        if len(row) or len(done):
            self._on_tokens(NewTokens(sentences[row], place, tokens[row, place], done))
