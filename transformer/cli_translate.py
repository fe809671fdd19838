"""`python -m fused_transformer translate`: text in, its translation out, line by line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TextIO

import torch
from tqdm import tqdm

from fused_transformer.text import decode_lines
from fused_transformer.translation import Translation, Translator


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate; 0 if done, 1 with a message on standard error if something is wrong."""
    options = _parser().parse_args(arguments)
    try:
        _translate(options)
    except BrokenPipeError:  # the reader has what it wanted, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        print(f"translate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("translate: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer translate",
        description="Translate UTF-8 text, a sentence a line. Empty lines stay empty.",
        epilog="With --top-beams N a line has up to N output lines: its number from 0 ||| translation ||| score.",
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="a checkpoint, or the folder that train wrote")
    parser.add_argument("--input", metavar="FILE", help="default: standard input")
    parser.add_argument("--output", metavar="FILE", help="default: standard output")
    parser.add_argument("--beam-size", type=int, default=4, help="hypotheses; 1 is greedy (default: %(default)s)")
    parser.add_argument("--top-beams", type=int, help="print the best so many translations of a line, with scores")
    parser.add_argument(
        "--length-penalty", type=float, default=0.6, help="higher prefers longer ones (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="source tokens of a batch (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=1000, metavar="LINES", help="lines read, sorted by length, "
                        "translated and written at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


def _translate(options: argparse.Namespace) -> None:
    for name in ("chunk", "threads", "max_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    top_beams = options.top_beams or 1
    if not 1 <= top_beams <= options.beam_size:
        raise ValueError(f"--top-beams must be between 1 and --beam-size ({options.beam_size}), got {top_beams}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    translator = Translator.load(options.model, options.device)
    with contextlib.ExitStack() as stack:
        lines = _lines(options.input, stack)
        output = stack.enter_context(open(options.output, "w", encoding="utf-8")) if options.output else None
        # A bar only where it can't mix with the translations or with what is being typed.
        quiet = None if options.output or not sys.stdout.isatty() else True
        bar = stack.enter_context(tqdm(unit="line", disable=quiet))
        first = 0
        while chunk := list(islice(lines, options.chunk)):
            translations = translator.translate(
                chunk,
                beam_size=options.beam_size,
                top_beams=top_beams,
                length_penalty=options.length_penalty,
                max_tokens=options.max_tokens,
            )
            _write(translations, first, numbered=options.top_beams is not None, output=output)
            first += len(chunk)
            bar.update(len(chunk))


def _lines(path: str | None, stack: contextlib.ExitStack) -> Iterator[str]:
    if path is None:
        return decode_lines(sys.stdin.buffer, "standard input")
    return decode_lines(stack.enter_context(open(path, "rb")), path)


def _write(translations: list[list[Translation]], first: int, *, numbered: bool, output: TextIO | None) -> None:
    # Bytes to standard output: the translation is UTF-8 whatever the terminal's locale says.
    lines = [
        f"{number} ||| {text} ||| {score:.4f}" if numbered else text
        for number, beams in enumerate(translations, first)
        for text, score in beams
    ]
    block = "".join(line + "\n" for line in lines)
    if output is not None:
        output.write(block)
        output.flush()
    else:
        sys.stdout.buffer.write(block.encode())
        sys.stdout.buffer.flush()
