"""Greedy search, and beam search with tensor2tensor's semantics, as pure functions of a step function.

A step function gives the logits of every hypothesis' next token at once:

    step(prefixes (N, t) int64, sentences (N,) int64, parents (N,) int64) -> logits (N, V)

Row n is a hypothesis of sentence sentences[n]: bos and the tokens so far. It is row parents[n] of the previous call and
one more token, which is what a step function with a cache needs (at the first call parents is 0, 1, ... N-1). Nothing
here loops over sentences or beams, and a sentence leaves the batch as soon as its result can't change; the rows of a
sentence are together, and sentences keep their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_transformer.kernels import log_softmax_top_k

Step = Callable[[Tensor, Tensor, Tensor], Tensor]

_NEVER = float("-inf")


class Hypotheses(NamedTuple):
    """The N best translations of B sentences, best first.

    tokens: (B, N, T) int64, without bos and eos, filled with padding_idx beyond each hypothesis' length.
    lengths: (B, N) int64. Where fewer than N hypotheses were found, the rest have length 0 and score -inf.
    scores: (B, N) float32: beam search's penalised log-probability for finished ones, else the log-probability.
    finished: (B, N) bool: the hypothesis ended with eos; False if it was cut at the maximum length.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    finished: Tensor

    def tolist(self) -> list[list[list[int]]]:
        """The token numbers as lists: [sentence][rank][position]."""
        rows, lengths = self.tokens.tolist(), self.lengths.tolist()
        return [[row[:n] for row, n in zip(beams, ns, strict=True)] for beams, ns in zip(rows, lengths, strict=True)]


def _room(max_lengths: Tensor, beams: int, padding_idx: int) -> Hypotheses:
    batch, longest = max_lengths.numel(), int(max_lengths.max()) if max_lengths.numel() else 0
    return Hypotheses(
        tokens=max_lengths.new_full((batch, beams, longest), padding_idx),
        lengths=max_lengths.new_zeros(batch, beams),
        scores=torch.full((batch, beams), _NEVER, device=max_lengths.device),
        finished=torch.zeros(batch, beams, dtype=torch.bool, device=max_lengths.device),
    )


def _store(
    found: Hypotheses, sentences: Tensor, tokens: Tensor, lengths: Tensor, scores: Tensor, finished: Tensor
) -> None:
    """Write the results of the sentences that leave: tokens (b, N, t), the others (b, N), eos counted in lengths."""
    lengths = torch.where(scores > _NEVER, lengths - finished.long(), 0)
    width = tokens.shape[2]
    within = torch.arange(width, device=tokens.device) < lengths[..., None]
    found.tokens[sentences, :, :width] = torch.where(within, tokens, found.tokens[sentences, :, :width])
    found.lengths[sentences], found.scores[sentences], found.finished[sentences] = lengths, scores, finished


def _next_logits(step: Step, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
    logits = step(prefixes, sentences, parents)
    if logits.dim() != 2 or logits.shape[0] != prefixes.shape[0]:
        raise ValueError(f"step must return logits ({prefixes.shape[0]}, V), got {tuple(logits.shape)}")
    return logits


def _refuse_nan(log_probs: Tensor) -> None:
    # Called on the chosen few: where one logit is NaN, they are.
    if log_probs.isnan().any():
        raise ValueError("the logits hold NaN, so no next token can be chosen")


def _check_lengths(max_lengths: Tensor) -> None:
    if max_lengths.dim() != 1 or max_lengths.dtype != torch.int64:
        raise ValueError(f"max_lengths must be (B,) int64, got {tuple(max_lengths.shape)} {max_lengths.dtype}")
    if (max_lengths < 1).any():
        raise ValueError("max_lengths must be at least 1 for every sentence")


@torch.no_grad()
def search_greedy(
    step: Step, max_lengths: Tensor, *, bos_idx: int = 1, eos_idx: int = 2, padding_idx: int = 0
) -> Hypotheses:
    """Append the likeliest token until it is eos or a sentence has max_lengths[b] tokens.

    Args:
        step: gives the logits of the next token, see the module's docstring.
        max_lengths: (B,) int64, most tokens generated for each sentence, eos counted.
        bos_idx, eos_idx, padding_idx: the special tokens.

    Returns:
        Hypotheses with N = 1; a score is the sum of the tokens' log-probabilities, eos counted.

    Raises:
        ValueError: max_lengths or the logits have the wrong shape, or the logits hold NaN.
    """
    _check_lengths(max_lengths)
    found = _room(max_lengths, 1, padding_idx)
    sentences = torch.arange(max_lengths.numel(), device=max_lengths.device)
    prefixes = torch.full_like(sentences, bos_idx)[:, None]
    parents, scores = sentences, torch.zeros_like(sentences, dtype=torch.float32)
    while sentences.numel():
        log_prob, token = (x[:, 0] for x in log_softmax_top_k(_next_logits(step, prefixes, sentences, parents), 1))
        _refuse_nan(log_prob)
        scores = scores + log_prob
        prefixes = torch.cat([prefixes, token[:, None]], 1)
        length, ended = prefixes.shape[1] - 1, token == eos_idx
        parents = torch.arange(len(sentences), device=sentences.device)
        leaving = ended | (max_lengths[sentences] <= length)
        if leaving.any():
            row = leaving.nonzero()[:, 0]
            _store(
                found,
                sentences[row],
                prefixes[row, None, 1:],
                torch.full_like(row, length)[:, None],
                scores[row, None].float(),
                ended[row, None],
            )
            stay = (~leaving).nonzero()[:, 0]
            sentences, parents, prefixes, scores = sentences[stay], parents[stay], prefixes[stay], scores[stay]
    return found


def _best(k: int, scores: Tensor, *others: Tensor) -> list[Tensor]:
    """The k highest of scores (b, n), and the same entries of others (b, n, ...); the first wins a tie."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    rows = torch.arange(scores.shape[0], device=scores.device)[:, None]
    return [x[rows, order] for x in (scores, *others)]


@torch.no_grad()
def search_beams(
    step: Step,
    max_lengths: Tensor,
    *,
    beam_size: int = 4,
    top_beams: int = 1,
    length_penalty: float = 0.6,
    bos_idx: int = 1,
    eos_idx: int = 2,
    padding_idx: int = 0,
) -> Hypotheses:
    """Beam search with an alive and a finished list of `beam_size` hypotheses a sentence each.

        score(y) = log p(y) / ((5 + |y|) / 6) ** length_penalty            |y| counts eos

    Each step extends the alive hypotheses, keeps the 2 * beam_size likeliest extensions (so that even if beam_size of
    them end, as many live on), moves those that end with eos to the finished list if their score earns a place there,
    and the best of the others to the alive list. A sentence is done when it has max_lengths[b] tokens, or its likeliest
    alive hypothesis, scored as if it grew no less likely up to the maximum length, is below the best finished one
    (top_beams = 1) or the worst of a full finished list (top_beams > 1). Where nothing finished, the alive hypotheses
    are returned with their plain log-probabilities as scores.

    Args:
        step: gives the logits of the next token, see the module's docstring.
        max_lengths: (B,) int64, most tokens generated for each sentence, eos counted.
        beam_size: hypotheses followed at once.
        top_beams: hypotheses returned, at most beam_size.
        length_penalty: the exponent alpha, not negative; 0 ranks by log-probability, higher favours longer ones.
        bos_idx, eos_idx, padding_idx: the special tokens.

    Returns:
        Hypotheses with N = top_beams.

    Raises:
        ValueError: an argument is out of its range, or the logits have the wrong shape or hold NaN.

    Source: Wu et al. 2016, arXiv:1609.08144, eq. 14 (the penalty); tensor2tensor, utils/beam_search.py (the algorithm;
    it stops a whole batch at once and bounds the length by the longest source, which changes no result but the time).
    """
    _check_lengths(max_lengths)
    if not 1 <= top_beams <= beam_size:
        raise ValueError(f"top_beams must be between 1 and beam_size ({beam_size}), got {top_beams}")
    if not 0 <= length_penalty < float("inf"):  # a negative exponent would make the stopping rule unsound
        raise ValueError(f"length_penalty must be finite and not negative, got {length_penalty}")

    def penalty(length):
        return ((5.0 + length) / 6.0) ** length_penalty

    found = _room(max_lengths, top_beams, padding_idx)
    sentences = torch.arange(max_lengths.numel(), device=max_lengths.device)
    alive = torch.full_like(sentences, bos_idx)[:, None, None].repeat(1, beam_size, 1)
    alive_log_probs = torch.full(alive.shape[:2], _NEVER, device=alive.device)
    alive_log_probs[:, 0] = 0.0  # one hypothesis so far: equal ones would fill the list with copies
    finished = torch.full_like(alive, padding_idx)
    finished_scores = torch.full_like(alive_log_probs, _NEVER)
    finished_lengths = torch.zeros_like(alive[..., 0])

    parents = torch.arange(alive[..., 0].numel(), device=alive.device).view(alive.shape[:2])

    length = 0
    while sentences.numel():
        length += 1
        rows = sentences.repeat_interleave(beam_size)
        logits = _next_logits(step, alive.flatten(0, 1), rows, parents.flatten())
        vocabulary = logits.shape[1]
        if vocabulary < 2:
            raise ValueError(f"beam search needs at least 2 tokens to choose from, got {vocabulary}")
        likeliest, place = log_softmax_top_k(logits, 2 * beam_size, beams=beam_size, addend=alive_log_probs.flatten())
        _refuse_nan(likeliest)
        token, beam = place % vocabulary, place // vocabulary
        grown = torch.cat([alive.gather(1, beam[..., None].expand(-1, -1, length)), token[..., None]], 2)

        ended = token == eos_idx
        first_row = torch.arange(0, rows.numel(), beam_size, device=rows.device)[:, None]
        alive_log_probs, alive, parents = _best(
            beam_size, likeliest.masked_fill(ended, _NEVER), grown, first_row + beam
        )
        finished = F.pad(finished, (0, 1), value=padding_idx)
        finished_scores, finished, finished_lengths = _best(
            beam_size,
            torch.cat([finished_scores, (likeliest / penalty(length)).masked_fill(~ended, _NEVER)], 1),
            torch.cat([finished, grown], 1),
            torch.cat([finished_lengths, torch.full_like(token, length)], 1),
        )

        limits = max_lengths[sentences]
        hope = alive_log_probs[:, 0] / penalty(limits)
        beaten = finished_scores[:, 0 if top_beams == 1 else -1] > hope
        leaving = beaten | (limits <= length) | (hope == _NEVER)
        if leaving.any():
            row, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
            any_finished = (finished_scores[row, :1] > _NEVER).expand(-1, top_beams)
            scores = torch.where(any_finished, finished_scores[row, :top_beams], alive_log_probs[row, :top_beams])
            _store(
                found,
                sentences[row],
                torch.where(any_finished[..., None], finished[row, :top_beams], alive[row, :top_beams])[..., 1:],
                finished_lengths[row, :top_beams].masked_fill(~any_finished, length),
                scores.float(),
                any_finished & (scores > _NEVER),
            )
            sentences, parents = sentences[stay], parents[stay]
            alive, alive_log_probs = alive[stay], alive_log_probs[stay]
            finished, finished_scores, finished_lengths = finished[stay], finished_scores[stay], finished_lengths[stay]
    return found
