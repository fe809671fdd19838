"""Drawing tokens: who is drawn with which probability, and random numbers that depend on the sentence alone.

A row of logits costs one random number: the token where the running sum of the probabilities passes it. The number is a
hash of seed, sentence, sample and position, so nothing has a state, and the sentences beside it change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.hypotheses import NEVER
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.search_options import SearchOptions


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift would copy the sign


def mix(x: Tensor) -> Tensor:
    """int64 to int64, one to one, every bit of the result a mix of all bits of x.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64's step).
    """
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def sentence_keys(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(B,) int64: a hash of the first lengths[b] tokens of each row of (B, S), whatever comes behind them."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    hashes = mix(tokens.long() ^ mix(position))
    return mix(hashes.masked_fill(position >= lengths[:, None], 0).sum(1))


def uniforms(seed: int, keys: Tensor, samples: int, position: int) -> Tensor:
    """(B, samples) float64 in [0, 1): a random number for each sample of each sentence at this position."""
    sample = torch.arange(samples, device=keys.device)
    place = mix(mix(keys ^ mix(torch.full_like(keys, seed)))[:, None] ^ mix(sample)) ^ position
    return _shift(mix(place), 11).double() * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """A token of each row of logits (N, V), and its log-probability.

        p = softmax(logits / temperature), 0 but for the top_k likeliest tokens, and of these but for the likeliest
            whose likelier ones together have less than top_p of what is left

    Equal tokens have the order of their numbers.

    Args:
        logits: (N, V).
        uniform: (N,) float64 in [0, 1).
        options: of them temperature, top_k and top_p.

    Returns:
        log_probs: (N,) log_softmax(logits) at the tokens; NaN where a row holds NaN or +inf, -inf where all of it is.
        tokens: (N,) int64.
    """
    vocabulary = logits.shape[1]
    tokens = None  # None: column v is token v
    if options.top_k:
        log_probs, tokens = log_softmax_top_k(logits, min(options.top_k, vocabulary))
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        hopeless = logits.amax(1, keepdim=True) == NEVER
        log_probs = logits.masked_fill(hopeless, 0.0).log_softmax(1).masked_fill(hopeless, NEVER)
        if options.top_p < 1:
            log_probs, tokens = log_probs.sort(dim=1, descending=True, stable=True)
    column = _draw_column(log_probs, uniform, options)
    log_prob = log_probs.gather(1, column)[:, 0]
    return log_prob, (column if tokens is None else tokens.gather(1, column))[:, 0]


def _draw_column(log_probs: Tensor, uniform: Tensor, options: SearchOptions) -> Tensor:
    """(N, 1): where in a row of log_probs (N, n), descending if top_p is below 1, the number falls."""
    # A row without a number to choose by gets any column: what is found there tells the caller.
    usable = log_probs.amax(1, keepdim=True) > NEVER
    scaled = torch.where(usable, log_probs.double() / options.temperature, 0.0)
    # In whole units of 2^-52, which add up to the same on every device and in any order.
    sums = (scaled.softmax(1) * 2.0**52).long().cumsum(1)
    total = sums[:, -1:]
    if options.top_p < 1:
        likelier = sums.roll(1, 1)
        likelier[:, 0] = 0
        kept = (likelier.double() < options.top_p * total.double()).sum(1, keepdim=True)  # the first ones
        total = sums.gather(1, kept - 1)
    # A number below 1 times the total is below the total, rounded too, so the column found has a probability.
    return torch.searchsorted(sums, (uniform[:, None] * total.double()).long(), right=True)
