"""What a step of beam search makes of the likeliest continuations; see csrc/log_softmax_top_k/advance_beams.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels._dispatch import undisturbed

# Of values, places and the fields of Alive.
_DTYPES = (torch.float32, torch.int64, torch.float64, torch.float32, torch.int64, torch.float32)


class Alive(NamedTuple):
    """k hypotheses of each of b sentences, the likeliest first; a score of -inf: there is none.

    scores: (b, k) float64, log-probabilities: a sum of hundreds of float32 ones would lose their last digits.
    behind: (b, k) float32, scores - scores[:, :1]. How far each is behind the likeliest has few digits ahead of the
        point, and so more behind it than its score: this is what a step reckons with.
    tokens: (b, k, 1 + t) int64, bos and the tokens so far.
    log_probs: (b, k, t) float32, of the tokens.
    """

    scores: Tensor
    behind: Tensor
    tokens: Tensor
    log_probs: Tensor

    def of(self, sentences: Tensor) -> Alive:
        return Alive(*(x[sentences] for x in self))


class Advanced(NamedTuple):
    """What lives on, and what else a search must know.

    alive: the next hypotheses.
    parents: (b · k,) int64, which of the (b · k) each extends.
    nan: a continuation is NaN.
    ended: a continuation ends with eos, however unlikely.
    hopeless: of a sentence nothing lives on.
    """

    alive: Alive
    parents: Tensor
    nan: bool
    ended: bool
    hopeless: bool


class Continuations(NamedTuple):
    """What `log_softmax_top_k` found, one by one: all (b, m), the likeliest first.

    beam, token: which hypothesis of the sentence is extended, and by what.
    log_prob: of the token; in the dtype of the values.
    score: float64, of all tokens.
    """

    beam: Tensor
    token: Tensor
    log_prob: Tensor
    score: Tensor

    @classmethod
    def of(cls, alive: Alive, values: Tensor, places: Tensor, vocabulary: int) -> Continuations:
        beam = places // vocabulary
        log_prob = values - alive.behind.gather(1, beam)
        return cls(beam, places - beam * vocabulary, log_prob, alive.scores[:, :1] + values)


def advance_beams(alive: Alive, values: Tensor, places: Tensor, *, vocabulary: int, eos_idx: int) -> Advanced:
    """The k likeliest continuations of each sentence that do not end with eos.

    On the CPU one native call; torch's operations are forty, each of 10 µs or more where the weights of a model have
    driven its code out of the caches.

    Args:
        alive: the hypotheses.
        values, places: (b, m) of `log_softmax_top_k(logits, m, beams=k, addend=alive.behind.flatten())`, m >= k.
        vocabulary, eos_idx: V, and the token that ends a hypothesis.

    Of continuations that are equally likely the first is taken.
    """
    b, k, room = alive.tokens.shape
    inputs = (values, places, *alive)
    as_expected = all(
        x.dtype is dtype and x.is_cpu and x.is_contiguous() for x, dtype in zip(inputs, _DTYPES, strict=True)
    )
    if not as_expected or not _native.available() or not undisturbed():
        return _plain(alive, values, places, vocabulary, eos_idx)
    following = Alive(
        torch.empty_like(alive.scores),
        torch.empty_like(alive.behind),
        alive.tokens.new_empty(b, k, room + 1),
        alive.log_probs.new_empty(b, k, room),
    )
    parents = alive.tokens.new_empty(b * k)
    flags = _native.library().advance_beams(
        (b, k, values.shape[1], room, vocabulary, eos_idx),
        tuple(x.data_ptr() for x in inputs),
        tuple(x.data_ptr() for x in (*following, parents)),
    )
    return Advanced(following, parents, *flags)


def _plain(alive: Alive, values: Tensor, places: Tensor, vocabulary: int, eos_idx: int) -> Advanced:
    """In plain torch, on any device; it is waited for once."""
    (b, k, _), found = alive.tokens.shape, Continuations.of(alive, values, places, vocabulary)
    ended = found.token == eos_idx
    scores, chosen = highest(found.score.masked_fill(ended, -torch.inf), k)
    beam, token, log_prob = (x.gather(1, chosen) for x in found[:3])
    parents = (torch.arange(b, device=beam.device)[:, None] * k + beam).flatten()

    def extended(x: Tensor, last: Tensor) -> Tensor:
        before = x.flatten(0, 1).index_select(0, parents).view(b, k, -1)
        return torch.cat([before, last[..., None].to(x.dtype)], 2)

    behind = (scores - scores[:, :1]).float()
    following = Alive(scores, behind, extended(alive.tokens, token), extended(alive.log_probs, log_prob))
    flags = torch.stack([values.isnan().any(), ended.any(), (scores[:, 0] == -torch.inf).any()]).tolist()
    return Advanced(following, parents, *flags)


def highest(scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n highest of each row, descending, and where they are; the first wins a tie (topk takes any)."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :n], order[:, :n]
