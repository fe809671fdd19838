"""An engine in a process of its own, which translates when it is told to and says how long it took.

Two engines in one process are in each other's way: GNU's OpenMP counts the threads of both, finds more than there are
processors, and lets them sleep at every barrier instead of waiting a moment. With 2 threads and batch 1 CTranslate2 so
falls from 195 tokens a second to 113, and this package from 400 to 225.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

from bench.decoding_work import Work
from bench.engines import ENGINES, Tokens

PAUSE = 0.05  # ahead of a turn, in seconds: threads of the one before it wait actively for a few milliseconds


class Contestant:
    """A loaded engine, see `bench.engines`.

    Raises:
        NotImplementedError: the engine does not have such weights.
    """

    def __init__(self, engine: str, weights: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what torch has set up
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, engine, weights, folder, threads), daemon=True)
        self._process.start()
        theirs.close()
        absent = self._answer()
        if absent is not None:
            self.stop()
            raise NotImplementedError(absent)

    def translate(self, work: Work) -> tuple[list[Tokens], float]:
        """What it found, and the seconds it took."""
        time.sleep(PAUSE)
        self._mine.send(work)
        return self._answer()

    def stop(self) -> None:
        self._mine.close()
        self._process.join()

    def _answer(self):
        try:
            answer = self._mine.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an engine's process ended with {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, engine: str, weights: str, folder: Path, threads: int) -> None:
    try:
        loaded = ENGINES[engine](folder, weights, threads)
    except NotImplementedError as error:
        return connection.send(str(error))
    connection.send(None)
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        try:
            start = time.perf_counter()
            found = work.run(loaded)
            took = time.perf_counter() - start
        except Exception as error:
            connection.send(error)
        else:
            connection.send((found, took))
