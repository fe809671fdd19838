"""The course of a training as JSON lines: an object every few steps, and one for each validation.

    {"kind": "step", "step": 50, "seconds": 9.1, "loss": 6.2, "learning_rate": 1e-4, "tokens_per_second": 5000,
     "gradient_norm": 0.8}
    {"kind": "validation", "step": 1000, "seconds": 180.0, "loss": 3.1, "bleu": 17.5}
    {"kind": "average", ...}                                           of the last checkpoints, when training is over

`seconds` is the time of training and validating so far, over all resumptions. `loss` and `tokens_per_second` of a step
are those of all steps since the entry ahead of it (since the resumption, if that came later).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
KINDS = ("step", "validation", "average")

Entry = dict[str, Any]


class TrainingLog:
    """Writes the log of a training to `folder`/log.jsonl, and to TensorBoard's files if asked to.

    Entries are in the file as soon as they are made, and on the disk ahead of the checkpoint of their step. A full disk
    does not stop the training: entries wait until they can be written.

    Args:
        folder: the training's.
        every: steps from one entry to the next.
        tensorboard: write to `folder`/tensorboard too.
        say: takes a line if the log can't be written.

    Raises:
        ValueError: every is below 1, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: str | Path, *, every: int = 50, tensorboard: bool = False, say: Callable[[str], object] = print
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path, self.every, self.say = Path(folder) / LOG, every, say
        self._writer_class = _summary_writer() if tensorboard else None
        self._writer: Any = None
        self._waiting: list[bytes] = []
        self._size = 0
        self._failed = False
        self._forget()

    def begin(self, step: int, *, averaged: bool = False) -> None:
        """Go on behind `step`: what a training that got further wrote about later steps is taken out.

        So is what it says of an average at this step, as that is made anew. A line that is no entry, such as a last one
        torn by a crash, goes too.

        Args:
            step: the last one that is done; 0: a new log.
            averaged: the average at this step is made already, and stays.

        Raises:
            OSError: the file can't be written.
        """
        found = read_log(self.path) if self.path.exists() and step else []
        kept = [entry for entry in found if _belongs(entry, step, averaged)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.unfinished")
        try:
            unfinished.write_bytes(b"".join(map(_line, kept)))
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._size = self.path.stat().st_size
        self._forget()
        if self._writer_class is not None:
            self._writer = self._writer_class(self.path.parent / "tensorboard", purge_step=step + 1 if step else None)

    def on_step(
        self,
        step: int,
        *,
        seconds: float,
        took: float,
        tokens: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
    ) -> None:
        """Note a step; every `every` steps this is an entry.

        Args:
            seconds: of the whole training so far.
            took: of them, this step.
            tokens: target tokens of this step.
        """
        self._losses.append(loss)
        self._took += took
        self._tokens += tokens
        if step % self.every:
            return
        values = {
            "loss": sum(self._losses) / len(self._losses),
            "learning_rate": learning_rate,
            "tokens_per_second": self._tokens / max(self._took, 1e-9),
            "gradient_norm": gradient_norm,
        }
        self._forget()
        self._add("step", step, seconds, values)

    def on_skipped_step(self, *, took: float) -> None:
        """Note the seconds of a step that was left out, which the tokens per second of the next entry count."""
        self._took += took

    def on_validation(self, step: int, *, seconds: float, loss: float, bleu: float, averaged: int = 0) -> None:
        """An entry for a validation: of the model as it is, or of an average of so many checkpoints."""
        kind, more = ("average", {"averaged": averaged}) if averaged else ("validation", {})
        self._add(kind, step, seconds, {"loss": loss, "bleu": bleu, **more})
        self.sync()

    def sync(self) -> None:
        """All entries onto the disk: called ahead of a checkpoint, so that none is missing if that is resumed."""
        self._write(sync=True)

    def close(self) -> None:
        """The end of it."""
        self.sync()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _forget(self) -> None:
        self._losses: list[float] = []
        self._took, self._tokens = 0.0, 0

    def _add(self, kind: str, step: int, seconds: float, values: dict[str, float]) -> None:
        numbers = {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }  # JSON has no others
        self._waiting.append(_line({"kind": kind, "step": step, "seconds": round(seconds, 3), **numbers}))
        self._write()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{'train' if kind == 'step' else kind}/{name}", value, step)
            self._writer.flush()

    def _write(self, sync: bool = False) -> None:
        data = b"".join(self._waiting)
        try:
            with open(self.path, "ab") as file:
                file.truncate(self._size)  # of a write that failed, a part may be there
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._failed:
                self.say(f"{self.path.name} can't be written, its entries wait: {error}")
            self._failed = True
            return
        self._failed = False
        self._size += len(data)
        self._waiting.clear()


def read_log(path: str | Path) -> list[Entry]:
    """The entries of a log in their order; lines that are none, such as a last one torn by a crash, are passed over.

    Args:
        path: the file, or the folder that `train` wrote.

    Raises:
        FileNotFoundError: there is no log.
    """
    path = Path(path)
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no {LOG} in {path.parent}: it is written by train")
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(entry, dict) and entry.get("kind") in KINDS and {"step", "seconds"} <= entry.keys():
            entries.append(entry)
    return entries


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _belongs(entry: Entry, step: int, averaged: bool) -> bool:
    return entry["step"] < step or (entry["step"] == step and (averaged or entry["kind"] != "average"))


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "writing TensorBoard's files needs tensorboard, which is not installed: "
            "pip install 'fused-transformer[tensorboard]'"
        ) from None
    return SummaryWriter
