"""Sentence pairs as numbers, and batches of them of about equal size in tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Ragged:
    """N sequences of different lengths in one flat tensor.

    Args:
        sequences: token numbers of each.

    Attributes:
        tokens: (all of them,) int32.
        lengths: (N,) int64.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
        self._starts = self.lengths.cumsum(0) - self.lengths
        self.tokens = torch.tensor([token for s in sequences for token in s], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: Tensor, padding_idx: int) -> Tensor:
        """(B, longest) int64: the sequences `rows` (B,), padded on the right."""
        lengths = self.lengths[rows]
        column = torch.arange(int(lengths.max()) if len(rows) else 0)
        within = column < lengths[:, None]
        place = (self._starts[rows, None] + column).masked_fill(~within, 0)
        return self.tokens[place].long().masked_fill(~within, padding_idx) if len(self.tokens) else place


class Batch(NamedTuple):
    """B sentence pairs, padded on the right.

    source: (B, S) int64, each ends with eos.
    source_lengths: (B,) int64.
    target: (B, L + 1) int64, bos ... eos; [:, :-1] goes into the decoder, [:, 1:] is to come out.
    target_lengths: (B,) int64 of target[:, :-1], so one less than bos ... eos has.
    """

    source: Tensor
    source_lengths: Tensor
    target: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(x.to(device) for x in self))


class Corpus:
    """N sentence pairs as token numbers.

    Args:
        source, target: token numbers of each sentence, without bos and eos.
        padding_idx, bos_idx, eos_idx: the special tokens.
        lines: where in a text each pair is from, for messages; default: 1, 2 ... N.

    Raises:
        ValueError: source, target and lines differ in number.
    """

    def __init__(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]],
        *,
        padding_idx: int = 0,
        bos_idx: int = 1,
        eos_idx: int = 2,
        lines: Sequence[int] | None = None,
    ) -> None:
        if len(source) != len(target):
            raise ValueError(f"source and target must have equally many sentences, got {len(source)} and {len(target)}")
        if lines is not None and len(lines) != len(source):
            raise ValueError(f"lines must have a number for each of {len(source)} pairs, got {len(lines)}")
        self.lines = torch.arange(1, len(source) + 1) if lines is None else torch.tensor(lines, dtype=torch.int64)
        self.padding_idx = padding_idx
        self.source = Ragged([[*s, eos_idx] for s in source])
        self.target = Ragged([[bos_idx, *t, eos_idx] for t in target])

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """A digest of all tokens in their order: equal for equal text under an equal vocabulary."""
        digest = hashlib.sha256()
        for side in (self.source, self.target):
            digest.update(side.lengths.numpy().data)
            digest.update(side.tokens.numpy().data)
        return digest.hexdigest()

    def batch(self, rows: Tensor) -> Batch:
        """The pairs `rows` (B,) int64."""
        return Batch(
            self.source.padded(rows, self.padding_idx),
            self.source.lengths[rows],
            self.target.padded(rows, self.padding_idx),
            self.target.lengths[rows] - 1,
        )


def cut_by_tokens(order: Tensor, lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Cut `order` (N,) into consecutive batches of at most max_tokens tokens, padding included.

    Args:
        order: (N,) int64, the sentences in the order they are to be cut in.
        lengths: (sentences, sides) int64; the limit holds for each side by itself.
        max_tokens: sentences of a batch times its longest.

    Raises:
        ValueError: one sentence is longer than max_tokens.
    """
    if len(order) and int(lengths[order].max()) > max_tokens:
        raise ValueError(f"a sentence has {int(lengths[order].max())} tokens, more than max_tokens, {max_tokens}")
    batches, first, longest = [], 0, 0
    for i, length in enumerate(lengths[order].amax(1).tolist()):
        longest = max(longest, length)
        if longest * (i - first + 1) > max_tokens:
            batches.append(order[first:i])
            first, longest = i, length
    return [*batches, order[first:]] if len(order) else []


class TokenBatches(Iterator[Tensor]):
    """Endless batches of sentence numbers (B,) int64, epoch after epoch.

    An epoch is shuffled and dealt into pools; within a pool sentences are sorted by length, so that a batch has little
    padding, and cut so that a batch has at most max_tokens tokens on each side, padding included; then the batches are
    shuffled. The order depends on seed and epoch alone, so a position in it is two numbers (`state_dict`).

    Args:
        corpus: the sentence pairs.
        max_tokens: most tokens of a batch on each side, padding, bos and eos included.
        pool_size: sentences sorted together.
        seed: of the shuffling.

    Raises:
        ValueError: the corpus is empty, or a sentence is longer than max_tokens.
    """

    def __init__(self, corpus: Corpus, max_tokens: int, *, pool_size: int = 8192, seed: int = 0) -> None:
        if not len(corpus):
            raise ValueError("there are no sentence pairs to make batches of")
        if pool_size < 1:
            raise ValueError(f"pool_size must be at least 1, got {pool_size}")
        self._lengths = torch.stack([corpus.target.lengths, corpus.source.lengths], 1)
        self.max_tokens, self.pool_size, self.seed = max_tokens, pool_size, seed
        self.epoch, self.position = 0, 0
        self._batches = self._epoch_batches()

    def _epoch_batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self._lengths), generator=generator)
        batches = []
        for pool in order.split(self.pool_size):
            target, source = self._lengths[pool].unbind(1)
            by_length = (target * (int(source.max()) + 1) + source).argsort(stable=True)
            batches += cut_by_tokens(pool[by_length], self._lengths, self.max_tokens)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def __next__(self) -> Tensor:
        if self.position == len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._epoch_batches()
        self.position += 1
        return self._batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch the next batch is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; everything the order depends on must be as it was.

        Raises:
            ValueError: the epoch has no such position.
        """
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._batches = self._epoch_batches()
        if not 0 <= self.position <= len(self._batches):
            raise ValueError(f"epoch {self.epoch} has {len(self._batches)} batches, so none at {self.position}")
