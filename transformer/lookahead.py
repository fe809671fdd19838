"""Decoding a few sentences several tokens at a time, with the same results as token by token.

A step of few hypotheses is bound by reading the weights, 154 MB of float32 at Transformer-base, and as many again for
the next token. But with int8 weights, a quarter as many, a decoder guesses what comes next, nearly always rightly. So
such a draft of the model goes ahead, and then one step of the model itself computes all hypotheses on the way: the
weights are read once for several tokens. Whatever the search asks for is answered by that step alone; where it asks for
a hypothesis that was not guessed, another begins there. So a draft decides how long a search takes, and nothing else:
a row of the native ops' results has the same bits whatever rows are beside it.

    level 0     the hypotheses that the search asked for
    level d     the likeliest extensions of those of level d - 1, in the draft's opinion

All of it is one native call, `kernels/decoder_step/ahead.py`. What is here follows the search, among a dozen rows at
most, and with Python's numbers: an operation of torch takes longer, where weights have just driven its code out of the
caches.

Source: Leviathan et al. 2023, arXiv:2211.17192 (speculative decoding, for one sequence); Miao et al. 2024,
arXiv:2305.09781 (a tree of guesses).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_transformer import guessing
from fused_transformer.kernels.decoder_step.ahead import Histories

if TYPE_CHECKING:
    from fused_transformer.inference import PackedTransformer


class LookingAhead:
    """A step function of `search.py` with guesses ahead; a `DeferringStep` and a `RankedStep`.

    A call's logits are the caller's to write to (`gives_its_logits`): none are handed out twice.

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
        self.scores: Tensor | None = None  # of the hypotheses, if the search tells them
        # The latest round: level 0 has `size` hypotheses of each sentence at `position`; `levels` of guesses follow.
        self.position = self.size = self.levels = 0
        self.guesses: list[int] = []
        self.ancestors: Tensor | None = None
        self.step: _Step | None = None
        # Where the search is in it: at this level, and its hypotheses are these rows of the step.
        self.level, self.rows = 0, list[int]()
        self.latest: Tensor | None = None  # hidden states that were last handed out

    # ---------------------------------------------------------------- what a search calls

    def rank_hypotheses(self, scores: Tensor) -> None:
        """Ahead of a call: the hypotheses' log-probabilities (b, beam_size) float64."""
        self.scores = scores

    def __call__(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        return self.project(self.hidden(prefixes, sentences, parents))

    def hidden(self, prefixes: Tensor, sentences: Tensor, parents: Tensor) -> Tensor:
        tokens = prefixes[:, -1].tolist()
        if self.step is None:
            self._begin(tokens)
        else:
            rows = [self.rows[parent] for parent in parents.tolist()]
            if not self._were_guessed(rows, tokens):
                self._go_on(rows, tokens)
        assert self.step is not None
        self.latest = self.step.of(self.rows)
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

    @property
    def each(self) -> int:
        """Rows of a sentence in the step: the hypotheses of level 0, then each level's guesses."""
        return self.size + self.levels * self.width

    def _first_of(self, level: int) -> int:
        """Of a sentence's rows, the first that is of this level."""
        return self.size + (level - 1) * self.width if level else 0

    def _were_guessed(self, rows: list[int], tokens: list[int]) -> bool:
        """Whether all that is asked for, extensions of these rows, is in the next level; if so the search is there."""
        if self.level == self.levels:
            return False
        first, following, found = self._first_of(self.level), self._first_of(self.level + 1), []
        for row, token in zip(rows, tokens, strict=True):
            sentence, place = divmod(row, self.each)
            start = (sentence * self.levels + self.level) * self.width
            try:
                at = self.guesses.index((place - first) * self.vocabulary + token, start, start + self.width)
            except ValueError:
                return False
            found.append(sentence * self.each + following + at - start)
        self.level, self.rows = self.level + 1, found
        return True

    def _begin(self, tokens: list[int]) -> None:
        """The first round: the hypotheses of a sentence are one and the same as yet."""
        self._look(tokens[:: self.beam_size], None)
        self.rows = [b * self.each for b in range(self.batch) for _ in range(self.beam_size)]

    def _go_on(self, rows: list[int], tokens: list[int]) -> None:
        """Another round: hypotheses that extend these rows and were not guessed.

        Sentences that have ended leave here, and not amid a round: until then its numbers are of those it began with.
        """
        assert self.ancestors is not None
        self.pace.learn(guessed=self.levels, used=self.level)
        self.position += self.level + 1
        left = len(tokens) // self.beam_size
        if left < self.batch:  # sentences have ended
            self.state.select_memory(_numbers([row // self.each for row in rows[:: self.beam_size]]))
            self.batch = left
        self._look(tokens, Histories(self.ancestors, rows))
        self.rows = [b * self.each + i for b in range(self.batch) for i in range(self.beam_size)]

    def _look(self, tokens: list[int], histories: Histories | None) -> None:
        self.size, self.level = len(tokens) // max(self.batch, 1), 0
        self.levels = max(0, min(self.pace.ahead, self.longest - 1 - self.position))
        self.state.reserve(self.position + guessing.MOST_LEVELS + 1)
        hidden, self.ancestors, self.guesses = self.model.step_ahead(
            tokens,
            self.state,
            self.position,
            batch=self.batch,
            slots=self.cache_rows,
            levels=self.levels,
            width=self.width,
            histories=histories,
            scores=self.scores,
        )
        self.step = _Step(self.model, hidden)


class _Step:
    """What one step of the model computed: hidden states of all levels, and of those on demand what follows them."""

    def __init__(self, model: PackedTransformer, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden
        self.rows: list[int] = []
        self._logits: Tensor | None = None
        self._likeliest: tuple[Tensor, Tensor] | None = None

    def of(self, rows: list[int]) -> Tensor:
        """Hidden states of these rows, which logits() and likeliest() are of then."""
        self.rows = rows
        return _rows(self.hidden, rows)

    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self.model.project(self.hidden)
        return _rows(self._logits, self.rows)

    def likeliest(self) -> tuple[Tensor, Tensor] | None:
        if self._likeliest is None:
            self._likeliest = self.model.likeliest(self.hidden)
        if self._likeliest is None:
            return None
        logit, token = self._likeliest
        return _rows(logit, self.rows), _rows(token, self.rows)


def _numbers(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device="cpu")  # where packed weights are, whatever the default device


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """x[rows]; a view where they follow each other."""
    first = rows[0]
    if rows == list(range(first, first + len(rows))):
        return x[first : first + len(rows)]
    return x.index_select(0, _numbers(rows))
