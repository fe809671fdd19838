"""Beam search with tensor2tensor's semantics, and by option with other penalties and stopping rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_transformer.beam_tree import BeamStep, OnStep
from fused_transformer.hypotheses import NEVER, Hypotheses, OnTokens, Results
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.search_options import SearchOptions
from fused_transformer.stepping import RankedStep, Step, check_lengths, next_logits, refuse_nan


class _Beams(NamedTuple):
    """n hypotheses of each of b sentences, bos and t tokens each; a score of -inf: there is none."""

    scores: Tensor  # (b, n) float64: a sum of hundreds of float32 log-probabilities would lose their last digits
    tokens: Tensor  # (b, n, 1 + t)
    log_probs: Tensor  # (b, n, t), of the tokens
    lengths: Tensor  # (b, n), eos counted

    def of(self, sentences: Tensor) -> _Beams:
        return _Beams(*(x[sentences] for x in self))

    def take(self, beams: Tensor) -> _Beams:
        """Of each sentence the hypotheses beams (b, m)."""
        rows = torch.arange(beams.shape[0], device=beams.device)[:, None]
        return _Beams(*(x[rows, beams] for x in self))

    def extend(self, rows: Tensor, log_probs: Tensor, tokens: Tensor, scores: Tensor) -> _Beams:
        """Of each sentence m hypotheses with one more token; all (b, m), and rows are numbers among the (b * n)."""

        def taken(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, *x.shape[2:])

        return _Beams(
            scores,
            torch.cat([taken(self.tokens), tokens[..., None]], 2),
            torch.cat([taken(self.log_probs), log_probs[..., None].to(self.log_probs.dtype)], 2),
            taken(self.lengths) + 1,
        )

    def width(self, tokens: int, padding_idx: int = 0) -> _Beams:
        """With room for so many tokens behind bos, cut or padded to it."""
        more = tokens - self.log_probs.shape[2]
        return self._replace(
            tokens=F.pad(self.tokens, (0, more), value=padding_idx), log_probs=F.pad(self.log_probs, (0, more))
        )

    def beside(self, others: _Beams) -> _Beams:
        return _Beams(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))

    def best(self, n: int) -> _Beams:
        """The n with the highest scores, best first; the first wins a tie."""
        return self.take(_highest(self.scores, n)[1])


def _highest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of each row, descending, and where they are; the first wins a tie (topk takes any)."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :n], order[:, :n]


def _start(sentences: Tensor, beams: int, token: int) -> _Beams:
    tokens = torch.full((len(sentences), beams, 1), token, device=sentences.device)
    scores = torch.full(tokens.shape[:2], NEVER, device=sentences.device, dtype=torch.float64)
    log_probs = torch.zeros(*scores.shape, 0, device=sentences.device)
    return _Beams(scores, tokens, log_probs, torch.zeros_like(tokens[..., 0]))


@torch.no_grad()
def search_beams(
    step: Step,
    max_lengths: Tensor,
    options: SearchOptions | None = None,
    *,
    bos_idx: int = 1,
    eos_idx: int = 2,
    padding_idx: int = 0,
    on_tokens: OnTokens | None = None,
    on_step: OnStep | None = None,
    **changes: Any,
) -> Hypotheses:
    """Beam search with an alive and a finished list of `beam_size` hypotheses a sentence each.

        score(y) = log p(y) / ((5 + |y|) / 6) ** length_penalty            |y| counts eos

    Each step extends the alive hypotheses, keeps the 2 * beam_size likeliest extensions (so that even if beam_size of
    them end, as many live on), moves those that end with eos to the finished list if their score earns a place there,
    and the best of the others to the alive list. A sentence is done when it has max_lengths[b] tokens, or its likeliest
    alive hypothesis, scored as if it grew no less likely up to the maximum length, is below the best finished one
    (stop_early, as for top_beams = 1) or the worst of a full finished list. Where nothing finished, the alive
    hypotheses are returned with their plain log-probabilities as scores.

    With `patience` an extension that ends counts if it is among the beam_size likeliest, whether these end or live on
    (as in fairseq, Hugging Face and CTranslate2), and a sentence is done with its first round(beam_size * patience)
    finished hypotheses, which are all kept.

    Args:
        step: gives the logits of the next token, see `search.py`.
        max_lengths: (B,) int64, most tokens generated for each sentence, eos counted.
        options: of them beam_size, top_beams, length_penalty, penalty, stop_early and patience; None: the defaults.
        bos_idx, eos_idx, padding_idx: the special tokens.
        on_tokens: told of the tokens that all hypotheses of a sentence have in common, as these grow.
        on_step: told of each step's extensions and what became of them.
        changes: options by name: search_beams(step, max_lengths, beam_size=8).

    Returns:
        Hypotheses with N = top_beams.

    Raises:
        ValueError: an argument is out of its range, or the logits have the wrong shape or hold NaN.

    Source: Wu et al. 2016, arXiv:1609.08144, eq. 14 (the penalty); tensor2tensor, utils/beam_search.py (the algorithm;
    it stops a whole batch at once and bounds the length by the longest source, which changes no result but the time);
    Kasai et al. 2022, arXiv:2204.05424, algorithm 1 (patience).
    """
    check_lengths(max_lengths)
    options = replace(options or SearchOptions(), **changes)
    beam_size, top_beams, capacity = options.beam_size, options.top_beams, options.finished_capacity
    stop_early = top_beams == 1 and options.patience is None if options.stop_early is None else options.stop_early
    decisive = 0 if stop_early else -1
    results = Results(max_lengths, top_beams, padding_idx, on_tokens)
    sentences = torch.arange(max_lengths.numel(), device=max_lengths.device)
    # The finished ones have all their room at once, as most steps add none to them.
    longest = int(max_lengths.max()) if len(sentences) else 0
    finished = _start(sentences, capacity, padding_idx).width(longest, padding_idx)
    alive = _start(sentences, beam_size, bos_idx)
    alive.scores[:, 0] = 0.0  # one hypothesis so far: equal ones would fill the list with copies
    parents = torch.arange(alive.scores.numel(), device=sentences.device).view(alive.scores.shape)
    among_the_first = torch.arange(2 * beam_size, device=sentences.device) < beam_size
    # What changes only when a sentence leaves.
    first_rows, rows, limits = parents[:, :1], sentences.repeat_interleave(beam_size), max_lengths
    limit_penalties = options.penalise(limits.double())
    rank = step.rank_hypotheses if isinstance(step, RankedStep) else None
    length = 0
    while sentences.numel():
        length += 1
        if rank is not None:
            rank(alive.scores)
        logits = next_logits(step, alive.tokens.flatten(0, 1), rows, parents.flatten())
        vocabulary = logits.shape[1]
        if vocabulary < 2:
            raise ValueError(f"beam search needs at least 2 tokens to choose from, got {vocabulary}")
        # How far each is behind the likeliest has few digits ahead of the point, and so more behind it than its score.
        first = alive.scores[:, :1]
        behind = (alive.scores - first).float()
        near, place = log_softmax_top_k(logits, 2 * beam_size, beams=beam_size, addend=behind.flatten())
        refuse_nan(near)
        token, beam = place % vocabulary, place // vocabulary
        likeliest, log_prob = first + near, near - behind.gather(1, beam)

        ended = token == eos_idx
        arriving = ended & (likeliest > NEVER)
        if options.patience is not None:
            room = capacity - (finished.scores > NEVER).sum(1, keepdim=True)
            arriving &= among_the_first
            arriving &= arriving.cumsum(1) <= room
        if arriving.any():
            scores = (likeliest / options.penalise(length)).masked_fill(~arriving, NEVER)
            arrived = alive.extend(first_rows + beam, log_prob, token, scores).width(longest, padding_idx)
            finished = finished.beside(arrived).best(capacity)
        scores, chosen = _highest(likeliest.masked_fill(ended, NEVER), beam_size)
        if on_step is not None:
            penalised = (likeliest / options.penalise(length)).masked_fill(~arriving, NEVER)
            told = (sentences, beam, token, likeliest.float(), penalised.float(), ended, chosen)
            on_step(BeamStep(*(x.clone() for x in told)))  # they may be kept, or written to
        parents = first_rows + beam.gather(1, chosen)
        alive = alive.extend(parents, log_prob.gather(1, chosen), token.gather(1, chosen), scores)

        hope = alive.scores[:, 0] / limit_penalties
        bound = hope if options.patience is None else NEVER  # with patience it takes a full list, no more
        done = finished.scores[:, decisive] > bound
        leaving = done | (limits <= length) | (hope == NEVER)
        if leaving.any():
            row, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
            _store(results, sentences[row], finished.of(row), alive.of(row), top_beams)
            sentences, parents, alive, finished = sentences[stay], parents[stay], alive.of(stay), finished.of(stay)
            first_rows, rows = first_rows[: len(stay)], sentences.repeat_interleave(beam_size)
            limits, limit_penalties = limits[stay], limit_penalties[stay]
        if results.streaming:
            results.tell(sentences, alive.tokens[:, 0, 1:], _common(alive, finished))
    return results.found


def _store(results: Results, sentences: Tensor, finished: _Beams, alive: _Beams, top_beams: int) -> None:
    """The best finished hypotheses; of sentences that have none, the best alive ones."""
    any_finished = finished.scores[:, :1] > NEVER
    finished = finished.width(alive.log_probs.shape[2])
    scores, tokens, log_probs, lengths = (
        torch.where(any_finished.view(-1, *[1] * (done.dim() - 1)), done[:, :top_beams], going[:, :top_beams])
        for done, going in zip(finished, alive, strict=True)
    )
    results.store(sentences, tokens[..., 1:], log_probs, lengths, scores, any_finished.expand_as(scores))


def _common(alive: _Beams, finished: _Beams) -> Tensor:
    """(b,): with how many tokens all of a sentence's hypotheses begin: what comes of them begins so too."""
    finished = finished.width(alive.log_probs.shape[2])
    tokens = torch.cat([alive.tokens, finished.tokens], 1)[..., 1:]
    real = torch.cat([alive.scores, finished.scores], 1) > NEVER
    same = (tokens == alive.tokens[:, :1, 1:]) | ~real[..., None]
    return same.all(1).long().cumprod(1).sum(1)
