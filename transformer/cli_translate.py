"""`python -m fused_transformer translate`: text in, its translation out, line by line."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import torch
from tqdm import tqdm

from fused_transformer.cli_translate_options import FORMATS, parser, search_options
from fused_transformer.processes import own_device
from fused_transformer.text import decode_lines
from fused_transformer.translation import Translator


def main(arguments: Sequence[str] | None = None) -> int:
    """Translate; 0 if done, 1 with a message on standard error if something is wrong."""
    options = parser().parse_args(arguments)
    try:
        _translate(options)
    except BrokenPipeError:  # the reader has what it wanted, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        print(f"translate: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        print("translate: not enough memory: try a smaller --batch-tokens or --beam-size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("translate: interrupted", file=sys.stderr)
        return 130
    return 0


def _translate(options: argparse.Namespace) -> None:
    for name in ("chunk", "threads", "max_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            option = {"max_tokens": "batch-tokens"}.get(name, name)
            raise ValueError(f"--{option} must be positive, got {getattr(options, name)}")
    search = search_options(options)
    form = options.format or ("text" if options.top_beams is None and not search.num_samples else "nbest")
    if form == "text" and search.greedy:
        search = replace(search, scores=False)
    _check_files(options)
    device = own_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    translator = Translator.load(options.model, device, weights=options.weights, cuda_graphs=options.cuda_graphs)
    typed = options.input is None and sys.stdin.isatty()
    with contextlib.ExitStack() as stack:
        lines = _lines(options.input, options.errors, stack)
        prefixes = None if options.prefixes is None else _lines(options.prefixes, options.errors, stack)
        output = stack.enter_context(open(options.output, "wb")) if options.output else sys.stdout.buffer
        # A bar only where it can't mix with the translations or with what is being typed; None: on a terminal.
        quiet = typed or options.interactive or (not options.output and sys.stdout.isatty())
        bar = stack.enter_context(tqdm(unit="line", disable=quiet or None))
        writer = stack.enter_context(_WholeLines(output))
        results = translator.translate_stream(
            lines,
            search,
            prefixes=prefixes,
            buffer=1 if typed or options.interactive else options.chunk,
            max_tokens=options.max_tokens,
        )
        write = FORMATS[form]
        for number, translations in enumerate(results):
            writer.write("".join(line + "\n" for line in write(number, translations)))
            bar.update()


def _lacks_memory(error: Exception) -> bool:
    # torch's allocator for a CPU has no exception of its own
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _check_files(options: argparse.Namespace) -> None:
    """That there is something to read and to write to, and that they are not the same."""
    if options.input is None and sys.stdin is None:
        raise ValueError("standard input is closed: give a file with --input")
    if options.output is None and sys.stdout is None:
        raise ValueError("standard output is closed: give a file with --output")
    if not options.output or not os.path.isfile(options.output):
        return  # a device such as /dev/null is read and written without harm
    own = os.stat(options.output)
    for read in filter(None, (options.input, options.prefixes)):
        if os.path.samestat(os.stat(read), own):
            raise ValueError(f"--output is {read}, which is to be read")
    with contextlib.suppress(OSError):  # an input that is no file
        if options.input is None and os.path.samestat(os.fstat(sys.stdin.fileno()), own):
            raise ValueError(f"--output is {options.output}, which is read as standard input")


def _lines(path: str | None, errors: str, stack: contextlib.ExitStack) -> Iterator[str]:
    if path is None:
        return decode_lines(sys.stdin.buffer, "standard input", errors=errors)
    return decode_lines(stack.enter_context(open(path, "rb")), path, errors=errors)


class _WholeLines:
    """Writes blocks of lines to a file so that Ctrl-C can't cut one in two.

    What is written is UTF-8 whatever the terminal's locale says. Ctrl-C while writing takes effect behind the block; a
    second one, where the reader has stopped reading, at once.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._writing, self._interrupted = file, False, False
        self._before: object = None

    def __enter__(self) -> _WholeLines:
        with contextlib.suppress(ValueError):  # not the main thread, where no signal arrives
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def write(self, block: str) -> None:
        self._writing = True
        try:
            self._file.write(block.encode())
            self._file.flush()
        finally:
            self._writing = False
        if self._interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        if not self._writing or self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
