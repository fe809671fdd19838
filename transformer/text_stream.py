"""The text of a translation while its tokens come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character's bytes decodes to


class NewText(NamedTuple):
    """What one more token adds to the translation of a line.

    line: its number, from 0.
    text: "" where the token only begins a character, say; a line's texts together are its translation.
    token: the token's number; None where the line is done, whose text is what was still held back.
    """

    line: int
    text: str
    token: int | None


class TextStream:
    """One translation's text, of which only what later tokens can't change is given out.

    Args:
        decode: the text of a list of token numbers.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._told = ""

    def push(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        self._tokens.append(token)
        text = self._decode(self._tokens).rstrip(_UNFINISHED)
        return self._tell(text) if text.startswith(self._told) else ""

    def finish(self) -> str:
        """The rest."""
        return self._tell(self._decode(self._tokens))

    def _tell(self, text: str) -> str:
        new, self._told = text[len(self._told) :], text
        return new
