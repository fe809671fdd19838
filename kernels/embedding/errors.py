"""The error of a token outside the vocabulary, in the same words from every backend."""

from __future__ import annotations

from torch import Tensor


def bad_token(tokens: Tensor, number: int, vocabulary: int) -> IndexError:
    """The error for the token at flat index `number`."""
    index: list[int] = []
    for size in reversed(tokens.shape):
        index.insert(0, number % size)
        number //= size
    token = int(tokens[tuple(index)])
    where = f" at index {index}" if index else ""
    return IndexError(f"tokens holds {token}{where}, outside the vocabulary of {vocabulary} (0 ... {vocabulary - 1})")
