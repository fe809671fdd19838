"""Translates batches of token numbers with a Transformer: greedy decoding, beam search, samples.

Keys and values of earlier positions are kept between steps (`DecoderState`); only the newest position is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from fused_transformer.beam_tree import OnStep
from fused_transformer.guessing import levels_for
from fused_transformer.incremental import DecoderState
from fused_transformer.kernels.memory import empty_pages
from fused_transformer.lookahead import LookingAhead
from fused_transformer.sampling import sentence_keys
from fused_transformer.search import Hypotheses, OnTokens, SearchOptions, Step, search
from fused_transformer.stepping import check_lengths

if TYPE_CHECKING:
    from fused_transformer.graphed import GraphedTransformer
    from fused_transformer.inference import PackedTransformer
    from fused_transformer.model import Transformer

    Model: TypeAlias = Transformer | PackedTransformer | GraphedTransformer


@contextmanager
def evaluating(model: torch.nn.Module | PackedTransformer | GraphedTransformer) -> Iterator[None]:
    """Dropout is off inside the block; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _CachedStep:
    """A step function of `search.py` over an encoded source: the cache follows the search's choices."""

    def __init__(self, model: Model, memory: Tensor, memory_lengths: Tensor, beam_size: int) -> None:
        self.model, self.beam_size, self.sentences = model, beam_size, len(memory)
        self.state: Any = model.start(memory, memory_lengths, beam_size=beam_size)  # the model's own kind

    def __call__(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        if self.beam_size > 1 and isinstance(self.state, DecoderState) and not self.state.length:
            return self._first(prefixes)
        return self.model.project(self.hidden(prefixes, sentences, parents))

    def _first(self, prefixes: Tensor) -> Tensor:
        """The hypotheses of a sentence are one and the same as yet, and are computed as one."""
        self.state.begin_as_one()
        logits = self.model.project(self.model.step(prefixes[:: self.beam_size, -1], self.state))
        self.state.split(self.beam_size)
        copies = empty_pages(len(logits), self.beam_size, logits.shape[1], like=logits)
        return copies.copy_(logits[:, None]).flatten(0, 1)

    def hidden(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        count = len(parents) // self.beam_size
        if count < self.sentences:
            beams = parents.view(count, self.beam_size)
            self.sentences = count
            self.state.select(beams[:, 0] // self.beam_size)
            first_row = torch.arange(0, parents.numel(), self.beam_size, device=parents.device)
            parents = (first_row[:, None] + beams % self.beam_size).flatten()
        if self.beam_size > 1 and self.state.length:
            self.state.reorder(parents)
        return self.model.step(prefixes[:, -1], self.state)


class _DeferringStep(_CachedStep):
    """Of a model that tells the likeliest token without all logits; see `deferred.py`."""

    model: PackedTransformer
    gives_its_logits = True  # products with packed weights are new tensors

    def __init__(
        self, model: PackedTransformer, memory: Tensor, memory_lengths: Tensor, options: SearchOptions
    ) -> None:
        super().__init__(model, memory, memory_lengths, options.rows)
        self.scores = options.scores  # whether these will be asked for

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.model.likeliest(hidden, scores=self.scores)

    def project(self, hidden: Tensor) -> Tensor:
        return self.model.project(hidden)


def _step_function(
    model: Model, memory: Tensor, source_lengths: Tensor, options: SearchOptions, max_lengths: Tensor
) -> Step:
    if not hasattr(model, "likeliest"):
        return _CachedStep(model, memory, source_lengths, options.rows)
    packed = cast("PackedTransformer", model)
    few = len(memory) > 0 and levels_for(len(memory), options.rows) > 0
    if few and not options.num_samples and packed.draft is not None:
        return LookingAhead(packed, memory, source_lengths, options.rows, int(max_lengths.max()))
    return _DeferringStep(packed, memory, source_lengths, options)


def _check_source(source_tokens: Tensor) -> None:
    if not isinstance(source_tokens, Tensor):
        raise TypeError(f"source_tokens must be a torch.Tensor, got {type(source_tokens).__name__}")
    if source_tokens.dim() != 2:
        raise ValueError(f"source_tokens must be (B, S), got shape {tuple(source_tokens.shape)}")


def length_limits(source_lengths: Tensor, options: SearchOptions) -> Tensor:
    """(B,) int64: the most tokens of each translation, eos counted, as the options have it."""
    limits = source_lengths.long() + options.max_length_beyond_source
    limits = limits.clamp(min=options.min_length + 1)  # which needs no more than max_length
    return limits if options.max_length is None else limits.clamp(max=options.max_length)


@torch.no_grad()
def generate(
    model: Model,
    source_tokens: Tensor,
    source_lengths: Tensor | None = None,
    options: SearchOptions | None = None,
    *,
    max_lengths: Tensor | None = None,
    prefixes: Tensor | None = None,
    on_tokens: OnTokens | None = None,
    on_step: OnStep | None = None,
) -> Hypotheses:
    """Translate as the options say: beam search, greedily if beam_size is 1, or by drawing if num_samples is set.

    A translation does not depend on the other sentences of its batch (but for the rounding of matrix products).

    Args:
        model: a Transformer, decoded in eval mode and left in the mode it was in; or a packed or graphed one.
        source_tokens: (B, S) int64, right-padded with the model's padding_idx.
        source_lengths: (B,) int64; None counts the tokens that are not padding.
        options: None: the paper's beam search.
        max_lengths: (B,) int64, most tokens generated, eos and prefix counted; None: as the options say, by default
            source_lengths + 50.
        prefixes: (B, P) int64, what each translation begins with, right-padded with the model's padding_idx.
        on_tokens: told after each step of the tokens that are certain by then; see `NewTokens`.
        on_step: told of each step of a beam search; see `BeamStep`.

    Returns:
        Hypotheses with N = options.returned, best first: tokens (B, N, T), lengths, scores, finished (B, N) and
        log_probs (B, N, T).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or the model gives NaN.

    Source: the limit of source + 50 is Vaswani et al. 2017, section 6.1; for the rest see `SearchOptions`.
    """
    _check_source(source_tokens)
    options = options or SearchOptions()
    if source_lengths is None:
        source_lengths = model.lengths(source_tokens)
    if max_lengths is None:
        max_lengths = length_limits(source_lengths, options)
    if max_lengths.shape != source_tokens.shape[:1]:
        raise ValueError(f"max_lengths must be ({len(source_tokens)},), got shape {tuple(max_lengths.shape)}")
    check_lengths(max_lengths)
    config = model.config
    with evaluating(model):
        memory = model.encode(source_tokens, source_lengths)
        return search(
            _step_function(model, memory, source_lengths, options, max_lengths),
            max_lengths,
            options,
            forced=prefixes,
            keys=sentence_keys(source_tokens, source_lengths) if options.num_samples else None,
            on_tokens=on_tokens,
            on_step=on_step,
            bos_idx=config.bos_idx,
            eos_idx=config.eos_idx,
            padding_idx=config.padding_idx,
        )


def greedy(
    model: Model,
    source_tokens: Tensor,
    source_lengths: Tensor | None = None,
    *,
    max_lengths: Tensor | None = None,
) -> Hypotheses:
    """Translate with the likeliest token at every step: `generate` with beam_size 1.

    Returns:
        Hypotheses with N = 1; scores are log-probabilities.
    """
    return generate(model, source_tokens, source_lengths, SearchOptions(beam_size=1), max_lengths=max_lengths)


def beam_search(
    model: Model,
    source_tokens: Tensor,
    source_lengths: Tensor | None = None,
    *,
    beam_size: int = 4,
    top_beams: int = 1,
    length_penalty: float = 0.6,
    max_lengths: Tensor | None = None,
) -> Hypotheses:
    """Translate with beam search; the defaults are the paper's. `generate` has more options.

        score(y) = log p(y | x) / ((5 + |y|) / 6) ** length_penalty            |y| counts eos

    Args:
        model, source_tokens, source_lengths, max_lengths: see `generate`.
        beam_size: hypotheses followed at once; 1 is greedy decoding, as in tensor2tensor.
        top_beams: how many of the best hypotheses to return, at most beam_size.
        length_penalty: the exponent alpha, not negative; higher favours longer translations.

    Returns:
        Hypotheses with N = top_beams, best first.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or the model gives NaN.

    Source: Vaswani et al. 2017, section 6.1; Wu et al. 2016, eq. 14; tensor2tensor, utils/beam_search.py.
    """
    options = SearchOptions(beam_size=beam_size, top_beams=top_beams, length_penalty=length_penalty)
    return generate(model, source_tokens, source_lengths, options, max_lengths=max_lengths)
