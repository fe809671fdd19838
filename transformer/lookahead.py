"""Decoding a few sentences several tokens at a time, with the same results as token by token.

A step of few hypotheses is bound by reading the weights, 154 MB of float32 at Transformer-base, and as many again for
the next token. But with int8 weights, a quarter as many, a decoder guesses what comes next, nearly always rightly. So
such a draft of the model goes ahead, and then one step of the model itself computes all hypotheses on the way: the
weights are read once for several tokens. Whatever the search asks for is answered by that step alone; where it asks for
a hypothesis that was not guessed, another begins there. So a draft decides how long a search takes, and nothing else:
a row of the native ops' results has the same bits whatever rows are beside it.

    level 0     the hypotheses that the search asked for
    level d     the likeliest extensions of those of level d - 1, in the draft's opinion

The draft reads the model's own keys and values of all earlier positions, and where it has written its own, for the
guesses, the model writes over them. A row of a level is written in a row of the cache of its own, so that hypotheses of
several levels can be computed side by side (`decoder_step` with positions and slots).

Source: Leviathan et al. 2023, arXiv:2211.17192 (speculative decoding, for one sequence); Miao et al. 2024,
arXiv:2305.09781 (a tree of guesses).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_transformer import guessing
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.kernels.decoder_step import PackedDecoder
from fused_transformer.kernels.linear import linear

if TYPE_CHECKING:
    from fused_transformer.inference import PackedTransformer


def _numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu")  # where packed weights are, whatever the default device


class _Level(NamedTuple):
    """`size` hypotheses of each of b sentences, those of a sentence together: b · size rows."""

    size: int
    tokens: Tensor  # (b · size,), the last of each
    ancestors: Tensor  # (b · size, room) int32, see `DecoderState`
    keys: Tensor | None = None  # (b, size): V · (which of its sentence in the level before it extends) + token


class LookingAhead:
    """A step function of `search.py` with guesses ahead; a `DeferringStep` and a `RankedStep`.

    Around the model's step are many operations of a few numbers each, so nothing here is done twice. A call's logits
    are the caller's to write to (`gives_its_logits`): none are handed out twice.

    Args:
        model: with a draft.
        memory, memory_lengths: of the encoder.
        beam_size: rows of each sentence.
        longest: no hypothesis has more tokens, eos counted.
    """

    gives_its_logits = True

    def __init__(
        self, model: PackedTransformer, memory: Tensor, memory_lengths: Tensor, beam_size: int, longest: int
    ) -> None:
        draft = model.draft
        assert draft is not None
        self.model, self.draft, self.beam_size, self.longest = model, draft, beam_size, longest
        self.batch, self.vocabulary = len(memory), draft.output.out_features
        self.width = min(guessing.width_for(beam_size), self.vocabulary - 1)
        self.cache_rows = max(self.width, beam_size)  # for each sentence
        self.state = model.start(memory, memory_lengths, beam_size=self.cache_rows)
        self.pace = guessing.Pace(guessing.levels_for(self.batch, beam_size))
        self.places: dict[tuple[int, ...], _Places] = {}
        self.levels: list[_Level] = []
        self.level = 0  # which holds the hypotheses of the last call
        self.at = _numbers(0)  # the place of each in it
        self.position = 0  # of level 0
        self.scores: Tensor | None = None
        self.step: _Step | None = None
        self.latest: Tensor | None = None  # hidden states that were last handed out

    # ---------------------------------------------------------------- what a search calls

    def rank_hypotheses(self, scores: Tensor) -> None:
        """Ahead of a call: the hypotheses' log-probabilities (b, beam_size)."""
        self.scores = (scores - scores[:, :1]).float()  # which is all that guessing compares

    def __call__(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        return self.project(self.hidden(prefixes, sentences, parents))

    def hidden(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        tokens = prefixes[:, -1]
        if not self._was_guessed(tokens, parents):
            self._look(self._first(tokens) if not self.levels else self._next(tokens, parents))
        assert self.step is not None
        self.latest = self.step.of(self.level, self.at)
        return self.latest

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        if hidden is self.latest and self.step is not None:
            return self.step.likeliest()
        return self.model.likeliest(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        if hidden is self.latest and self.step is not None:
            return self.step.logits()
        return self.model.project(hidden)

    # ---------------------------------------------------------------- following the search

    def _was_guessed(self, tokens: Tensor, parents: Tensor) -> bool:
        """Whether all hypotheses asked for are in the next level; if so that is where the search is now."""
        if self.level + 1 >= len(self.levels):
            return False
        before, following = self.levels[self.level], self.levels[self.level + 1]
        keys, place, sentence = following.keys, self.at.index_select(0, parents), None
        assert keys is not None
        if self.batch > 1:
            sentence = place // before.size
            place, keys = place - sentence * before.size, keys.index_select(0, sentence)
        found, which = (keys == (place * self.vocabulary + tokens)[:, None]).max(1)
        if not found.all():
            return False
        self.level += 1
        self.at = which if sentence is None else sentence * following.size + which
        return True

    def _first(self, tokens: Tensor) -> _Level:
        """Level 0 of the first round: the hypotheses of a sentence are one and the same as yet."""
        self.at = _numbers(self.batch).repeat_interleave(self.beam_size)
        if self.scores is not None:
            self.scores = self.scores[:, :1]
        ancestors = self.at.new_zeros(self.batch, self._make_room(), dtype=torch.int32)
        return _Level(1, tokens[:: self.beam_size], ancestors)

    def _next(self, tokens: Tensor, parents: Tensor) -> _Level:
        """Level 0 of another round: hypotheses that extend those of the last call and were not guessed.

        Sentences that have ended leave here, and not amid a round: until then its numbers are of those it began with.
        """
        self.pace.learn(guessed=len(self.levels) - 1, used=self.level)
        before, place = self.levels[self.level], self.at.index_select(0, parents)
        self.position += self.level + 1
        left = len(tokens) // self.beam_size
        if left < self.batch:  # sentences have ended
            self.state.select_memory(place[:: self.beam_size] // before.size)
            self.batch = left
        ancestors = before.ancestors.index_select(0, place)
        more = self._make_room() - ancestors.shape[1]
        self.at = _numbers(len(tokens))
        return _Level(self.beam_size, tokens, F.pad(ancestors, (0, more)) if more else ancestors)

    def _make_room(self) -> int:
        """For all levels that may come; returns the positions that the cache has then."""
        self.state.reserve(self.position + guessing.MOST_LEVELS + 1)
        return self.state.cache.shape[4]

    # ---------------------------------------------------------------- guessing, and the step that computes all

    def _look(self, level: _Level) -> None:
        ahead = min(self.pace.ahead, self.longest - 1 - self.position)
        scores = level.tokens.new_zeros(len(level.tokens), dtype=torch.float32)
        if self.scores is not None:
            scores = self.scores.flatten()
        self.levels, self.level, inputs = [level], 0, [self._input(level, 0)]
        for depth in range(ahead):
            level, scores = self._guess(inputs[-1], level, scores, depth)
            self.levels.append(level)
            inputs.append(self._input(level, depth + 1))
        sizes = tuple(level.size for level in self.levels)
        x, ancestors = self._beside(inputs), self._beside([level.ancestors for level in self.levels])
        hidden = self._run(self.model._decoder, x, ancestors, sizes, 0)
        self.step = _Step(self.model, hidden, sizes, self.batch)

    def _beside(self, parts: list[Tensor]) -> Tensor:
        """Of each level (b · size, n): of one sentence all levels' rows, then of the next."""
        if len(parts) == 1 or self.batch == 1:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat([part.unflatten(0, (self.batch, -1)) for part in parts], 1).flatten(0, 1)

    def _input(self, level: _Level, depth: int) -> Tensor:
        """(b · size, E), the embedded tokens; and from now on a level reads what it writes."""
        level.ancestors.select(1, self.position + depth).copy_(self._places((level.size,)).slots32)
        return self.model._target(level.tokens[:, None], start=self.position + depth).squeeze(1)

    def _guess(self, x: Tensor, level: _Level, scores: Tensor, depth: int) -> tuple[_Level, Tensor]:
        """The level after this one, and its log-probabilities (b · width,), in the draft's opinion."""
        hidden = self._run(self.draft.decoder, x, level.ancestors, (level.size,), depth)
        best, keys = log_softmax_top_k(linear(hidden, self.draft.output), self.width, beams=level.size, addend=scores)
        rows = keys // self.vocabulary
        tokens = (keys - rows * self.vocabulary).flatten()
        if self.batch > 1:
            rows = rows + level.size * _numbers(self.batch)[:, None]
        return _Level(self.width, tokens, level.ancestors.index_select(0, rows.flatten()), keys), best.flatten()

    def _run(self, decoder: PackedDecoder, x: Tensor, ancestors: Tensor, sizes: tuple[int, ...], depth: int) -> Tensor:
        """Levels of these sizes, the first of them `depth` behind level 0; x (rows, E)."""
        places, first = self._places(sizes), self.position + depth
        return self.model.step_at(
            x,
            self.state,
            ancestors,
            places.levels + first,
            places.slots,
            length=first + len(sizes) - 1,
            beams=sum(sizes),
            decoder=decoder,
        )

    def _places(self, sizes: tuple[int, ...]) -> _Places:
        key = (self.batch, *sizes)
        if key not in self.places:
            self.places[key] = _Places(sizes, self.batch, self.cache_rows)
        return self.places[key]


class _Places:
    """Where rows of levels of these sizes lie: levels, (rows,), and slots, (rows,) in the cache."""

    def __init__(self, sizes: tuple[int, ...], batch: int, cache_rows: int) -> None:
        levels = [level for level, size in enumerate(sizes) for _ in range(size)] * batch
        slots = [b * cache_rows + i for b in range(batch) for size in sizes for i in range(size)]
        self.levels, self.slots = (torch.tensor(numbers, device="cpu") for numbers in (levels, slots))
        self.slots32 = self.slots.int()


class _Step:
    """What one step of the model computed: hidden states of all levels, and of those on demand what follows them."""

    def __init__(self, model: PackedTransformer, hidden: Tensor, sizes: tuple[int, ...], batch: int) -> None:
        self.model, self.hidden, self.sizes, self.batch = model, hidden, sizes, batch
        self.rows = _numbers(0)
        self._logits: Tensor | None = None
        self._likeliest: tuple[Tensor, Tensor] | None = None

    def of(self, level: int, places: Tensor) -> Tensor:
        """Hidden states of a level's hypotheses (of its b · n), which logits() and likeliest() are of then."""
        self.rows = places + sum(self.sizes[:level])
        if self.batch > 1:
            size = self.sizes[level]
            self.rows += places // size * (sum(self.sizes) - size)
        return self.hidden.index_select(0, self.rows)

    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self.model.project(self.hidden)
        return self._logits.index_select(0, self.rows)

    def likeliest(self) -> tuple[Tensor, Tensor] | None:
        if self._likeliest is None:
            self._likeliest = self.model.likeliest(self.hidden)
        if self._likeliest is None:
            return None
        logit, token = self._likeliest
        return logit.index_select(0, self.rows), token.index_select(0, self.rows)
