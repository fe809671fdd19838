"""Translates batches of token numbers with a Transformer: greedy decoding and beam search.

Keys and values of earlier positions are kept between steps (`DecoderState`); only the newest position is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_transformer.search import Hypotheses, Step, search_beams, search_greedy

if TYPE_CHECKING:
    from fused_transformer.model import Transformer


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout is off inside the block; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _CachedStep:
    """A step function of `search.py` over an encoded source: the cache follows the search's choices."""

    def __init__(self, model: Transformer, memory: Tensor, memory_lengths: Tensor, beam_size: int) -> None:
        self.model, self.beam_size, self.sentences = model, beam_size, len(memory)
        self.state = model.start(memory, memory_lengths, beam_size=beam_size)

    def __call__(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        beams = parents.view(-1, self.beam_size)
        if len(beams) < self.sentences:
            self.sentences = len(beams)
            self.state.select(beams[:, 0] // self.beam_size)
        if self.beam_size > 1 and self.state.length:
            first_row = torch.arange(0, parents.numel(), self.beam_size, device=parents.device)
            self.state.reorder((first_row[:, None] + beams % self.beam_size).flatten())
        return self.model.project(self.model.step(prefixes[:, -1], self.state))


def _encode(
    model: Transformer,
    source_tokens: Tensor,
    source_lengths: Tensor | None,
    max_lengths: Tensor | None,
    beam_size: int = 1,
) -> tuple[Step, Tensor]:
    """The step function over the encoded source, and the most tokens each sentence may get."""
    if not isinstance(source_tokens, Tensor):
        raise TypeError(f"source_tokens must be a torch.Tensor, got {type(source_tokens).__name__}")
    if source_tokens.dim() != 2:
        raise ValueError(f"source_tokens must be (B, S), got shape {tuple(source_tokens.shape)}")
    if source_lengths is None:
        source_lengths = model.lengths(source_tokens)
    if max_lengths is None:
        max_lengths = source_lengths.long() + 50
    if max_lengths.shape != source_tokens.shape[:1]:
        raise ValueError(f"max_lengths must be ({len(source_tokens)},), got shape {tuple(max_lengths.shape)}")
    memory = model.encode(source_tokens, source_lengths)
    return _CachedStep(model, memory, source_lengths, beam_size), max_lengths


def _special(model: Transformer) -> dict[str, int]:
    config = model.config
    return {"bos_idx": config.bos_idx, "eos_idx": config.eos_idx, "padding_idx": config.padding_idx}


@torch.no_grad()
def greedy(
    model: Transformer,
    source_tokens: Tensor,
    source_lengths: Tensor | None = None,
    *,
    max_lengths: Tensor | None = None,
) -> Hypotheses:
    """Translate with the likeliest token at every step.

    Args:
        model: decoded in eval mode, and left in the mode it was in.
        source_tokens: (B, S) int64, right-padded with the model's padding_idx.
        source_lengths: (B,) int64; None counts the tokens that are not padding.
        max_lengths: (B,) int64, most tokens generated, eos counted; None allows source_lengths + 50, as the paper.

    Returns:
        Hypotheses with N = 1: tokens (B, 1, T), lengths, scores (log-probabilities) and finished (B, 1).

    Raises:
        TypeError, ValueError: the arguments have the wrong type or shape, or the model gives NaN.

    Source: the limit of source + 50 is Vaswani et al. 2017, section 6.1.
    """
    with evaluating(model):
        step, max_lengths = _encode(model, source_tokens, source_lengths, max_lengths)
        return search_greedy(step, max_lengths, **_special(model))


@torch.no_grad()
def beam_search(
    model: Transformer,
    source_tokens: Tensor,
    source_lengths: Tensor | None = None,
    *,
    beam_size: int = 4,
    top_beams: int = 1,
    length_penalty: float = 0.6,
    max_lengths: Tensor | None = None,
) -> Hypotheses:
    """Translate with beam search; the defaults are the paper's.

        score(y) = log p(y | x) / ((5 + |y|) / 6) ** length_penalty            |y| counts eos

    A translation does not depend on the other sentences of its batch (but for the rounding of matrix products).

    Args:
        model: decoded in eval mode, and left in the mode it was in.
        source_tokens: (B, S) int64, right-padded with the model's padding_idx.
        source_lengths: (B,) int64; None counts the tokens that are not padding.
        beam_size: hypotheses followed at once; 1 is greedy decoding, as in tensor2tensor.
        top_beams: how many of the best hypotheses to return, at most beam_size.
        length_penalty: the exponent alpha, not negative; higher favours longer translations.
        max_lengths: (B,) int64, most tokens generated, eos counted; None allows source_lengths + 50, as the paper.

    Returns:
        Hypotheses with N = top_beams, best first: tokens (B, N, T), lengths, scores and finished (B, N).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or the model gives NaN.

    Source: Vaswani et al. 2017, section 6.1; Wu et al. 2016, eq. 14; tensor2tensor, utils/beam_search.py.
    """
    if beam_size == top_beams == 1:
        return greedy(model, source_tokens, source_lengths, max_lengths=max_lengths)
    with evaluating(model):
        step, max_lengths = _encode(model, source_tokens, source_lengths, max_lengths, beam_size)
        return search_beams(
            step,
            max_lengths,
            beam_size=beam_size,
            top_beams=top_beams,
            length_penalty=length_penalty,
            **_special(model),
        )
