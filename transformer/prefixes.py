"""What translations are to begin with: a prefix for each line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

Pair = tuple[str, "str | None"]  # a line, and what its translation begins with


class PrefixTooLong(ValueError):
    """A prefix leaves its translation no room. Nothing has been translated.

    line: its index among the lines.
    """

    def __init__(self, line: int, tokens: int, limit: int, number: int | None = None) -> None:
        self.line, self._tokens, self._limit = line, tokens, limit
        self._number = line + 1 if number is None else number
        super().__init__(
            f"the prefix of line {self._number} has {tokens} tokens, and its translation may have {limit}, eos counted"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.line, self._tokens, self._limit, self._number)

    def of_line(self, number: int) -> PrefixTooLong:
        """The same of line `number`, from 1, of a text that these lines are part of."""
        return PrefixTooLong(self.line, self._tokens, self._limit, number)


def check_room(tokens: Tensor, limits: Tensor, lines: list[int]) -> None:
    """Of each of the lines the tokens of its prefix, and how many its translation may have."""
    for line, count, limit in zip(lines, tokens.tolist(), limits.tolist(), strict=True):
        if count >= limit:
            raise PrefixTooLong(line, count, limit)


def pairs_of(lines: Iterable[str], prefixes: Iterable[str]) -> Iterator[Pair]:
    """Line by line; like zip(strict=True), with a sentence of its own."""
    others = iter(prefixes)
    count = 0
    for count, line in enumerate(lines, 1):
        prefix = next(others, None)
        if prefix is None:
            raise ValueError(f"there must be a prefix for each line, but there are only {count - 1}")
        yield line, prefix
    if next(others, None) is not None:
        raise ValueError(f"there must be a line for each prefix, but there are only {count}")
