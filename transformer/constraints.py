"""Step functions (see `search.py`) with some next tokens forbidden: their logits are -inf.

A forbidden token is taken out ahead of the softmax, so the probabilities of the others add up to 1. Nothing here loops
over sentences or hypotheses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.hypotheses import NEVER
from fused_transformer.search_options import SearchOptions
from fused_transformer.stepping import RankedStep, Step, gives_its_logits


def constrain(
    step: Step, options: SearchOptions, *, forced: Tensor | None = None, eos_idx: int = 2, padding_idx: int = 0
) -> Step:
    """`step` without what the options forbid; `step` itself where they forbid nothing.

    Args:
        step: gives the logits (N, V) of every hypothesis' next token.
        options: of them min_length, no_repeat_ngram_size and suppress_tokens.
        forced: (B, P) int64, tokens that the translations begin with, padded with padding_idx; a forced token is chosen
            whatever else is forbidden, and its log-probability is 0.
        eos_idx, padding_idx: the special tokens.

    Raises:
        ValueError: forced has the wrong shape or dtype, or holds a negative number, eos, or padding ahead of a token;
            and, from the step, a token of forced or suppress_tokens is beyond the vocabulary.
    """
    if forced is not None:
        _check_forced(forced, eos_idx, padding_idx)
        if not forced.shape[1]:
            forced = None
    if forced is None and not (options.min_length or options.no_repeat_ngram_size or options.suppress_tokens):
        return step
    return _Constrained(step, options, forced, eos_idx, padding_idx)


def _check_forced(forced: Tensor, eos_idx: int, padding_idx: int) -> None:
    if forced.dim() != 2 or forced.dtype != torch.int64:
        raise ValueError(f"a forced prefix must be (B, P) int64, got {tuple(forced.shape)} {forced.dtype}")
    real = forced != padding_idx
    if (real & (forced < 0)).any():
        raise ValueError(f"a forced prefix holds token numbers, got {int(forced[real].min())}")
    if (forced == eos_idx).any():
        raise ValueError(f"a forced prefix can't hold eos ({eos_idx}): nothing would follow it")
    if (~real[:, :-1] & real[:, 1:]).any():
        raise ValueError(f"a forced prefix has padding ({padding_idx}) ahead of a token; pad right")


class _Constrained:
    def __init__(self, step: Step, options: SearchOptions, forced: Tensor | None, eos_idx: int, padding_idx: int):
        self.step, self.options, self.forced = step, options, forced
        self.eos_idx, self.padding_idx = eos_idx, padding_idx
        self.highest = max([*options.suppress_tokens, int(forced.max()) if forced is not None and len(forced) else 0])

    def rank_hypotheses(self, scores: Tensor) -> None:
        if isinstance(self.step, RankedStep):
            self.step.rank_hypotheses(scores)

    def __call__(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        logits = self.step(prefixes, sentences, parents)
        if not gives_its_logits(self.step):
            logits = logits.clone()  # it may hand out rows of a table, or one row many times
        generated = prefixes[:, 1:]
        length = generated.shape[1]
        if self.highest >= logits.shape[-1]:
            raise ValueError(f"there is no token {self.highest} in a vocabulary of {logits.shape[-1]}")
        if self.options.suppress_tokens:
            logits[:, list(self.options.suppress_tokens)] = NEVER
        if length < self.options.min_length:
            logits[:, self.eos_idx] = NEVER
        if self.options.no_repeat_ngram_size:
            row, token = repeating(generated, self.options.no_repeat_ngram_size)
            logits[row, token] = NEVER
        if self.forced is not None and length < self.forced.shape[1]:
            token = self.forced[sentences, length]
            row = (token != self.padding_idx).nonzero()[:, 0]
            logits[row] = NEVER
            logits[row, token[row]] = 0.0
        return logits


def repeating(tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Next tokens that would make `size` tokens in a row appear twice in a row of tokens (N, t).

    Returns:
        rows and tokens, (n,) int64 each; a pair may come more than once.
    """
    if tokens.shape[1] < size:
        return tokens.new_empty(0), tokens.new_empty(0)
    grams = tokens.unfold(1, size, 1)  # (N, t - size + 1, size)
    ending = tokens[:, None, tokens.shape[1] - size + 1 :]  # (N, 1, size - 1), what the next token would complete
    row, place = (grams[..., :-1] == ending).all(-1).nonzero(as_tuple=True)
    return row, grams[row, place, -1]
