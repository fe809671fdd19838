"""Plain text files, one sentence a line, read with errors that name the file, the line and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path


def decode_lines(lines: Iterable[bytes], name: str, *, errors: str = "strict") -> Iterator[str]:
    """Each line as text without its end (\\n or \\r\\n); a byte order mark is dropped.

    Only \\n ends a line: characters such as U+2028 stay inside, so that parallel files stay parallel. With errors
    "replace", bytes that are not UTF-8 become U+FFFD.

    Raises:
        ValueError: a line is not UTF-8; the message names `name` and the line's number, from 1.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: line {number} is not valid UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        yield text.removesuffix("\n").removesuffix("\r")


def read_lines(path: str | Path) -> list[str]:
    """All lines of a UTF-8 file.

    Raises:
        FileNotFoundError, OSError: the file can't be read.
        ValueError: it is empty, or not UTF-8.
    """
    with open(path, "rb") as file:
        lines = list(decode_lines(file, str(path)))
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


def read_parallel(source_path: str | Path, target_path: str | Path) -> tuple[list[str], list[str]]:
    """The lines of two files where line i of one is the translation of line i of the other.

    Raises:
        FileNotFoundError, OSError: a file can't be read.
        ValueError: one is empty or not UTF-8, or they differ in their number of lines.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise ValueError(
            f"parallel files must have the same number of lines, but {source_path} has {len(source)} "
            f"and {target_path} has {len(target)}"
        )
    return source, target
