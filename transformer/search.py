"""Search for translations as a pure function of a step function: greedy, beam search, and samples.

A step function gives the logits of every hypothesis' next token at once:

    step(prefixes (N, t) int64, sentences (N,) int64, parents (N,) int64) -> logits (N, V)

Row n is a hypothesis of sentence sentences[n]: bos and the tokens so far. It is row parents[n] of the previous call and
one more token, which is what a step function with a cache needs (at the first call parents is 0, 1, ... N-1). Nothing
here loops over sentences or beams, and a sentence leaves the batch as soon as its result can't change; the rows of a
sentence are together, and sentences keep their order.

    greedy.py        greedy search                                  beams.py       beam search
    deferred.py      its log-probabilities, where a step function tells the likeliest token without all logits
    constraints.py   a step function with tokens forbidden          sampling.py    how a token is drawn
    hypotheses.py    what is returned
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_transformer.beam_tree import BeamStep, OnStep
from fused_transformer.beams import search_beams
from fused_transformer.constraints import constrain
from fused_transformer.greedy import search_greedy
from fused_transformer.hypotheses import NEVER, Hypotheses, NewTokens, OnTokens, Results
from fused_transformer.sampling import draw, uniforms
from fused_transformer.search_options import SearchOptions
from fused_transformer.stepping import Step, check_lengths, next_logits, refuse_nan

__all__ = [
    "BeamStep",
    "Hypotheses",
    "NewTokens",
    "OnStep",
    "OnTokens",
    "SearchOptions",
    "Step",
    "search",
    "search_beams",
    "search_greedy",
    "search_samples",
]

# Of the logits (N, V) that the step gave, and the sentences (N,) at a position: log-probabilities (N,) and tokens (N,).
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def search(
    step: Step,
    max_lengths: Tensor,
    options: SearchOptions | None = None,
    *,
    forced: Tensor | None = None,
    keys: Tensor | None = None,
    on_tokens: OnTokens | None = None,
    on_step: OnStep | None = None,
    bos_idx: int = 1,
    eos_idx: int = 2,
    padding_idx: int = 0,
) -> Hypotheses:
    """What the options ask for: samples if num_samples, greedy if options.greedy, else beam search.

    Args:
        step: gives the logits of the next token, see the module's docstring; options.rows rows for each sentence.
        max_lengths: (B,) int64, most tokens of each sentence, eos and a forced prefix counted. The options' own limits
            (max_length, max_length_beyond_source) are for the caller, who knows the sources.
        options: None: the paper's.
        forced: (B, P) int64, tokens that each translation begins with, padded with padding_idx.
        keys: (B,) int64, what a sentence's samples depend on beside the seed; None: its number.
        on_tokens: told after each step of the tokens that are certain now (of the best translation of each sentence).
        on_step: told of each step of a beam search, see `BeamStep`.
        bos_idx, eos_idx, padding_idx: the special tokens.

    Returns:
        Hypotheses with N = options.returned.

    Raises:
        ValueError: an argument has the wrong shape, a sentence's limit leaves no room for min_length or its forced
            prefix, the logits have the wrong shape or hold NaN, or steps are to be told of and it is no beam search.
    """
    options = options or SearchOptions()
    check_lengths(max_lengths)
    if on_step is not None and (options.num_samples or options.greedy):
        raise ValueError("on_step is told of the steps of beam search: beam_size must be above 1, and num_samples 0")
    if (max_lengths <= options.min_length).any():
        raise ValueError(
            f"every max_length must be above min_length ({options.min_length}), as it counts eos, "
            f"got {int(max_lengths.min())}"
        )
    step = constrain(step, options, forced=forced, eos_idx=eos_idx, padding_idx=padding_idx)
    if forced is not None:
        _check_room(forced, max_lengths, padding_idx)
    special: dict[str, Any] = {"bos_idx": bos_idx, "eos_idx": eos_idx, "padding_idx": padding_idx}
    special["on_tokens"] = on_tokens
    if options.num_samples:
        return search_samples(step, max_lengths, options, keys=keys, **special)
    if options.greedy:
        return search_greedy(step, max_lengths, scores=options.scores, **special)
    return search_beams(step, max_lengths, options, on_step=on_step, **special)


def _check_room(forced: Tensor, max_lengths: Tensor, padding_idx: int) -> None:
    if len(forced) != len(max_lengths):
        raise ValueError(f"there must be a forced prefix for each of {len(max_lengths)} sentences, got {len(forced)}")
    lengths = (forced != padding_idx).sum(1)
    if (lengths >= max_lengths).any():
        row = int((lengths >= max_lengths).nonzero()[0])
        raise ValueError(
            f"the forced prefix of sentence {row} has {int(lengths[row])} tokens, and its translation may have "
            f"{int(max_lengths[row])}, eos counted"
        )


@torch.no_grad()
def search_samples(
    step: Step,
    max_lengths: Tensor,
    options: SearchOptions,
    *,
    keys: Tensor | None = None,
    bos_idx: int = 1,
    eos_idx: int = 2,
    padding_idx: int = 0,
    on_tokens: OnTokens | None = None,
) -> Hypotheses:
    """Draw options.num_samples translations of each sentence, token by token, independently of each other.

    Args:
        step: gives the logits of the next token, see the module's docstring; num_samples rows for each sentence.
        max_lengths: (B,) int64, most tokens generated for each sentence, eos counted.
        options: of them num_samples, temperature, top_k, top_p and seed; see `sampling.draw`.
        keys: (B,) int64, what a sentence's samples depend on beside the seed; None: its number.
        bos_idx, eos_idx, padding_idx: the special tokens.
        on_tokens: told of each token, where num_samples is 1.

    Returns:
        Hypotheses with N = num_samples, the likeliest first; a score is the sum of the tokens' log-probabilities under
        the logits as they are, eos counted. The same sample can come more than once.

    Raises:
        ValueError: an argument has the wrong shape or range, the logits have the wrong shape or hold NaN, or tokens of
            more than one sample are asked for.
    """
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {options.num_samples}")
    if on_tokens is not None and options.num_samples > 1:
        raise ValueError(f"on_tokens follows one translation of a sentence, not {options.num_samples} samples")
    if keys is None:
        keys = torch.arange(max_lengths.numel(), device=max_lengths.device)
    if keys.shape != max_lengths.shape or keys.dtype != torch.int64:
        raise ValueError(f"keys must be ({max_lengths.numel()},) int64, got {tuple(keys.shape)} {keys.dtype}")
    samples = options.num_samples

    def drawn(logits: Tensor, sentences: Tensor, position: int) -> tuple[Tensor, Tensor]:
        uniform = uniforms(options.seed, keys[sentences[::samples]], samples, position)
        return draw(logits, uniform.flatten(), options)

    return _follow(step, max_lengths, drawn, samples, bos_idx, eos_idx, padding_idx, on_tokens)


def _follow(
    step: Step,
    max_lengths: Tensor,
    choose: Choose,
    samples: int,
    bos_idx: int,
    eos_idx: int,
    padding_idx: int,
    on_tokens: OnTokens | None,
) -> Hypotheses:
    """`samples` hypotheses of each sentence, each extended by one token a step until all have ended."""
    check_lengths(max_lengths)
    results = Results(max_lengths, samples, padding_idx, on_tokens)
    sentences = torch.arange(max_lengths.numel(), device=max_lengths.device)
    prefixes = torch.full((len(sentences), samples, 1), bos_idx, device=sentences.device)
    log_probs = torch.zeros(len(sentences), samples, 0, device=sentences.device)
    scores = log_probs.new_zeros(len(sentences), samples, dtype=torch.float64)  # a sum of hundreds
    lengths = torch.zeros_like(prefixes[..., 0])
    finished = torch.zeros_like(lengths, dtype=torch.bool)
    ended = finished  # with eos, or where there is no way on
    parents = torch.arange(lengths.numel(), device=lengths.device).view(lengths.shape)
    rows, limits, unmoved = sentences.repeat_interleave(samples), max_lengths, parents
    while sentences.numel():
        position = prefixes.shape[2] - 1
        logits = next_logits(step, prefixes.flatten(0, 1), rows, parents.flatten())
        log_prob, token = (x.view(-1, samples) for x in choose(logits, rows, position))
        if samples > 1:  # what has ended rides along until the sentence's other samples have
            log_prob, token = log_prob.masked_fill(ended, 0.0), token.masked_fill(ended, padding_idx)
        refuse_nan(log_prob)
        scores, lengths = scores + log_prob, lengths + ~ended
        prefixes = torch.cat([prefixes, token[..., None]], 2)
        log_probs = torch.cat([log_probs, log_prob[..., None]], 2)
        finished = finished | (token == eos_idx)
        ended = finished | (scores == NEVER)

        leaving = ended.all(1) | (limits <= position + 1)
        parents = unmoved
        if leaving.any():
            row, stay = leaving.nonzero()[:, 0], (~leaving).nonzero()[:, 0]
            order = scores[row].sort(dim=1, descending=True, stable=True).indices
            at = row[:, None], order
            results.store(sentences[row], prefixes[at][..., 1:], log_probs[at], lengths[at], scores[at], finished[at])
            sentences, parents, prefixes, log_probs = sentences[stay], parents[stay], prefixes[stay], log_probs[stay]
            scores, lengths, ended, finished = scores[stay], lengths[stay], ended[stay], finished[stay]
            rows, limits, unmoved = sentences.repeat_interleave(samples), limits[stay], unmoved[: len(stay)]
        results.tell(sentences, prefixes[:, 0, 1:], lengths[:, 0])
    return results.found
