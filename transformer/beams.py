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
from fused_transformer.kernels.beams import Alive, Continuations, advance_beams, highest
from fused_transformer.search_options import SearchOptions
from fused_transformer.stepping import NAN, RankedStep, Step, check_lengths, next_logits


class _Finished(NamedTuple):
    """n hypotheses of each of b sentences, with room for bos and t tokens each; a score of -inf: there is none."""

    scores: Tensor  # (b, n) float64
    tokens: Tensor  # (b, n, 1 + t)
    log_probs: Tensor  # (b, n, t), of the tokens
    lengths: Tensor  # (b, n), eos counted

    def of(self, sentences: Tensor) -> _Finished:
        return _Finished(*(x[sentences] for x in self))

    def width(self, tokens: int, padding_idx: int = 0) -> _Finished:
        """With room for so many tokens behind bos, cut or padded to it."""
        more = tokens - self.log_probs.shape[2]
        return self._replace(
            tokens=F.pad(self.tokens, (0, more), value=padding_idx), log_probs=F.pad(self.log_probs, (0, more))
        )

    def joined_by(self, others: _Finished) -> _Finished:
        """As many of both as there were, the best first; the first wins a tie."""
        every = _Finished(*(torch.cat(pair, 1) for pair in zip(self, others, strict=True)))
        best = highest(every.scores, self.scores.shape[1])[1]
        rows = torch.arange(len(best), device=best.device)[:, None]
        return _Finished(*(x[rows, best] for x in every))


def _start(sentences: Tensor, beams: int, bos_idx: int) -> Alive:
    """One hypothesis so far: equal ones would fill the list with copies."""
    scores = torch.full((len(sentences), beams), NEVER, device=sentences.device, dtype=torch.float64)
    scores[:, 0] = 0.0
    tokens = torch.full((*scores.shape, 1), bos_idx, device=sentences.device)
    log_probs = torch.zeros(*scores.shape, 0, device=sentences.device, dtype=torch.float32)
    return Alive(scores, scores.float(), tokens, log_probs)


def _none(sentences: Tensor, capacity: int, longest: int, padding_idx: int) -> _Finished:
    """With all their room at once, as most steps add none to them."""
    device = sentences.device
    scores = torch.full((len(sentences), capacity), NEVER, device=device, dtype=torch.float64)
    tokens = torch.full((*scores.shape, 1 + longest), padding_idx, device=device)
    log_probs = torch.zeros(*scores.shape, longest, device=device, dtype=torch.float32)
    return _Finished(scores, tokens, log_probs, torch.zeros_like(tokens[..., 0]))


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
    longest, nearest = (int(x) for x in max_lengths.aminmax()[::-1]) if len(sentences) else (0, 0)
    alive, finished = _start(sentences, beam_size, bos_idx), _none(sentences, capacity, longest, padding_idx)
    any_finished = False
    parents = torch.arange(alive.scores.numel(), device=sentences.device)
    among_the_first = torch.arange(2 * beam_size, device=sentences.device) < beam_size
    # What changes only when a sentence leaves.
    rows, limits = sentences.repeat_interleave(beam_size), max_lengths
    limit_penalties = options.penalise(limits.double())
    rank = step.rank_hypotheses if isinstance(step, RankedStep) else None
    length = 0
    while sentences.numel():
        length += 1
        if rank is not None:
            rank(alive.scores)
        logits = next_logits(step, alive.tokens.flatten(0, 1), rows, parents)
        vocabulary = logits.shape[1]
        if vocabulary < 2:
            raise ValueError(f"beam search needs at least 2 tokens to choose from, got {vocabulary}")
        likeliest = log_softmax_top_k(logits, 2 * beam_size, beams=beam_size, addend=alive.behind.flatten())
        following, parents, nan, some_end, hopeless = advance_beams(
            alive, *likeliest, vocabulary=vocabulary, eos_idx=eos_idx
        )
        if nan:
            raise ValueError(NAN)
        if some_end or on_step is not None:
            found = Continuations.of(alive, *likeliest, vocabulary)
            ended = found.token == eos_idx
            arriving = ended & (found.score > NEVER)
            if options.patience is not None:
                room = capacity - (finished.scores > NEVER).sum(1, keepdim=True)
                arriving &= among_the_first
                arriving &= arriving.cumsum(1) <= room
            scores = (found.score / options.penalise(length)).masked_fill(~arriving, NEVER)
            if arriving.any():
                arrived = _arrived(alive, found, scores).width(longest, padding_idx)
                finished, any_finished = finished.joined_by(arrived), True
            if on_step is not None:
                chosen = highest(found.score.masked_fill(ended, NEVER), beam_size)[1]
                told = (sentences, found.beam, found.token, found.score.float(), scores.float(), ended, chosen)
                on_step(BeamStep(*(x.clone() for x in told)))  # they may be kept, or written to
        alive = following

        if any_finished or hopeless or length >= nearest:
            hope = alive.scores[:, 0] / limit_penalties
            bound = hope if options.patience is None else NEVER  # with patience it takes a full list, no more
            done = finished.scores[:, decisive] > bound
            leaving = done | (limits <= length) | (hope == NEVER)
            if leaving.any():
                row, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
                _store(results, sentences[row], finished.of(row), alive.of(row), top_beams)
                sentences, alive, finished = sentences[stay], alive.of(stay), finished.of(stay)
                parents = parents.view(-1, beam_size)[stay].flatten()
                rows = sentences.repeat_interleave(beam_size)
                limits, limit_penalties = limits[stay], limit_penalties[stay]
                nearest = int(limits.min()) if len(stay) else 0
                any_finished = bool((finished.scores > NEVER).any())
        if results.streaming:
            results.tell(sentences, alive.tokens[:, 0, 1:], _common(alive, finished))
    return results.found


def _arrived(alive: Alive, found: Continuations, scores: Tensor) -> _Finished:
    """All continuations (b, m) as hypotheses, with these scores."""
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    tokens, log_probs = (x[rows, found.beam] for x in (alive.tokens, alive.log_probs))
    return _Finished(
        scores,
        torch.cat([tokens, found.token[..., None]], 2),
        torch.cat([log_probs, found.log_prob[..., None].to(log_probs.dtype)], 2),
        torch.full_like(found.token, tokens.shape[2]),
    )


def _store(results: Results, sentences: Tensor, finished: _Finished, alive: Alive, top_beams: int) -> None:
    """The best finished hypotheses; of sentences that have none, the best alive ones."""
    any_finished = finished.scores[:, :1] > NEVER
    length = alive.log_probs.shape[2]
    lengths = torch.full_like(alive.tokens[..., 0], length)
    scores, tokens, log_probs, lengths = (
        torch.where(any_finished.view(-1, *[1] * (done.dim() - 1)), done[:, :top_beams], going[:, :top_beams])
        for done, going in zip(
            finished.width(length), (alive.scores, alive.tokens, alive.log_probs, lengths), strict=True
        )
    )
    results.store(sentences, tokens[..., 1:], log_probs, lengths, scores, any_finished.expand_as(scores))


def _common(alive: Alive, finished: _Finished) -> Tensor:
    """(b,): with how many tokens all of a sentence's hypotheses begin: what comes of them begins so too."""
    finished = finished.width(alive.log_probs.shape[2])
    tokens = torch.cat([alive.tokens, finished.tokens], 1)[..., 1:]
    real = torch.cat([alive.scores, finished.scores], 1) > NEVER
    same = (tokens == alive.tokens[:, :1, 1:]) | ~real[..., None]
    return same.all(1).long().cumprod(1).sum(1)
