"""A training from start to end: steps, validation, checkpoints, averaging, and stopping at any moment without loss."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fused_transformer.checkpoint import BEST, LAST, UNFINISHED, read_file, save_checkpoint
from fused_transformer.evaluation import Validation
from fused_transformer.stop_signal import StopSignal
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer
from fused_transformer.training_log import TrainingLog
from fused_transformer.translation import Translator

SNAPSHOTS = "snapshots"


class _Stopped(Exception):
    """Raised inside a validation to break it off."""


@dataclass
class Progress:
    """What a run knows beside the trainer's state; part of each checkpoint.

    seconds: time spent in `TrainingRun.run`, all of it, over all resumptions.
    validated: the step of the last validation.
    averaged: the step at whose end the last average was made and measured.
    best: "step", "loss" and "bleu" of the best checkpoint, None as long as there is none.
    history: the same of each validation, with "seconds" and "train_loss".
    """

    seconds: float = 0.0
    validated: int = 0
    averaged: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class TrainingRun:
    """Trains until a number of steps or minutes, and keeps checkpoints in a folder.

    `last.safetensors` holds everything to go on; `best.safetensors` the model with the highest BLEU on the validation
    set (the lower loss wins a tie), or, without one, the last; a training that goes on without one keeps the best there
    is. At the end the weights of the last `average` validations are averaged, and become the best if their BLEU is the
    highest.

    Where several processes train together, each has a run of its own; the first validates and writes. A checkpoint
    that cannot be written during the training, as on a full disk, is reported and the one before it stays; the training
    goes on.

    Args:
        trainer: what is run.
        tokenizer: saved with the model.
        folder: where checkpoints go.
        settings: JSON-ready values saved with them.
        validation: None to do without.
        every: steps from one validation and checkpoint to the next.
        average: how many to average; 0 or 1: none.
        log: the first process's, closed when `run` ends; None: there is none.
        say: takes each line of the report.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        folder: Path,
        settings: dict[str, Any],
        *,
        validation: Validation | None = None,
        every: int = 1000,
        average: int = 5,
        log: TrainingLog | None = None,
        say: Callable[[str], object] = tqdm.write,
    ) -> None:
        self.trainer, self.tokenizer, self.folder, self.settings = trainer, tokenizer, folder, settings
        self.validation, self.every, self.average, self.log, self.say = validation, every, average, log, say
        self.progress = Progress()
        self.fingerprint = trainer.corpus.fingerprint()
        self._losses: deque[float] = deque(maxlen=100)

    def resume(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint's further state and tensors; the model has its weights already.

        Raises:
            ValueError: it has no training state, or the text or the options are not those it was trained with.
        """
        if "trainer" not in state:
            raise ValueError(f"the checkpoint holds a model but no training state; {LAST} holds both")
        if state["fingerprint"] != self.fingerprint:
            raise ValueError("the training text is not the text this training was begun with")
        self.trainer.load_state(state["trainer"], tensors)
        self.progress = Progress(**state["progress"])

    def run(self, steps: int, minutes: float | None = None) -> bool:
        """Train up to `steps` steps in all, or `minutes` in all; True if done, False if a signal stopped it.

        Raises:
            OSError: the last checkpoint could not be written; the one before it is still there.
            ValueError: the processes do not have the same text, options and step.
        """
        trainer, processes = self.trainer, self.trainer.processes
        self._check_agreement()
        processes.once(self._tidy)
        begun = time.monotonic() - self.progress.seconds
        steps_before, tokens_before, seconds_before = trainer.step, trainer.tokens, self.progress.seconds

        with StopSignal(patient=processes.world > 1) as stop, _bar(steps, minutes, processes.first) as bar:
            while True:
                self.progress.seconds = time.monotonic() - begun
                over = trainer.step >= steps or (minutes is not None and self.progress.seconds >= 60 * minutes)
                stopped, over = map(bool, processes.sums([stop.requested, over]))  # one process's word is everyone's
                if stopped:
                    break
                if trainer.step > self.progress.validated and (over or trainer.step % self.every == 0):
                    self.progress = processes.once(lambda: self._check_point(stop))
                    continue
                if over:
                    break
                self._train_step(begun)
                rate = (trainer.tokens - tokens_before) / (time.monotonic() - begun - seconds_before)
                bar.set_postfix_str(self._postfix(rate), refresh=False)
                done = trainer.step if minutes is None else min(self.progress.seconds, bar.total)
                bar.update(done - bar.n)
            self.progress.seconds = time.monotonic() - begun
            if trainer.step > steps_before or stopped:
                processes.once(lambda: self._save(LAST, whole=True))
            if not stopped:
                processes.once(lambda: self._finish(stop))
            if self.log is not None:
                self.log.close()
            return not any(processes.sums([stop.requested]))

    def _train_step(self, begun: float) -> None:
        trainer, step, tokens, start = self.trainer, self.trainer.step, self.trainer.tokens, time.monotonic()
        self._losses.append(trainer.train_step())
        if self.log is not None:
            now = time.monotonic()
            if trainer.step == step:  # float16 overflowed: this was no step, and the one ahead of it has its entry
                self.log.on_skipped_step(took=now - start)
                return
            self.log.on_step(
                trainer.step,
                seconds=now - begun,
                took=now - start,
                tokens=trainer.tokens - tokens,
                loss=self._losses[-1],
                learning_rate=trainer.schedule.rate(trainer.step),
                gradient_norm=trainer.grad_norm,
            )

    def _check_agreement(self) -> None:
        """All processes are to take the same steps, over the same text."""
        trainer = self.trainer
        found = trainer.processes.gathered((self.fingerprint, trainer.step, trainer.options))
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"process {rank} has not the text, the options and the checkpoint of process 0")

    def _tidy(self) -> None:
        """Remove what a killed process has left: files half-written, snapshots and log beyond its last checkpoint."""
        left = [path for folder in (self.folder, self.folder / SNAPSHOTS) for path in folder.glob(UNFINISHED)]
        left += [path for path in self._snapshots() if path.name > self._snapshot_name()]
        for path in left:
            path.unlink(missing_ok=True)
        if self.log is not None:
            self.log.begin(self.trainer.step, averaged=self.progress.averaged == self.trainer.step)

    def _snapshots(self) -> list[Path]:
        return sorted((self.folder / SNAPSHOTS).glob("step-*.safetensors"))

    def _snapshot_name(self) -> str:
        return f"step-{self.trainer.step:09d}.safetensors"

    def _postfix(self, tokens_per_second: float) -> str:
        rate = self.trainer.schedule.get_last_lr()[0]
        bleu = f", BLEU {self.progress.history[-1]['bleu']:.2f}" if self.progress.history else ""
        return (
            f"step {self.trainer.step}, epoch {self.trainer.batches.epoch + 1}, loss {self._train_loss():.3f}, "
            f"lr {rate:.2e}, {tokens_per_second:.0f} target tokens/s{bleu}"
        )

    def _train_loss(self) -> float:
        return sum(self._losses) / max(len(self._losses), 1)

    def _measure(self, stop: StopSignal) -> tuple[float, float] | None:
        """Validation loss and BLEU of the model as it is; None if a signal came in between."""

        def on_batch(_: int) -> None:
            if stop.requested:
                raise _Stopped

        assert self.validation is not None
        try:
            return self.validation.measure(Translator(self.trainer.model, self.tokenizer), on_batch)
        except _Stopped:
            return None

    def _check_point(self, stop: StopSignal) -> Progress:
        """Validate, keep the best, a snapshot to average, and the state to go on from; what is known then."""
        step = self.trainer.step
        if self.validation is not None:
            measured = self._measure(stop)
            if measured is None:
                return self.progress  # not noted as validated, so a resumed run does it again
            loss, bleu = measured
            entry: dict[str, Any] = {"step": step, "loss": loss, "bleu": bleu}
            if self.log is not None:
                self.log.on_validation(**entry, seconds=self.progress.seconds)
            better = self._keep_if_best(entry)
            self.progress.history.append({**entry, "seconds": self.progress.seconds, "train_loss": self._train_loss()})
            self.say(
                f"step {step}  {self.progress.seconds / 60:.1f} min  train loss {self._train_loss():.3f}  "
                f"valid loss {loss:.3f}  BLEU {bleu:.2f}{'  best' if better else ''}"
            )
            if self.average > 1:
                self._snapshot()
        self.progress.validated = step
        self._save_if_possible(LAST, whole=True)
        return self.progress

    def _keep_if_best(self, entry: dict[str, Any]) -> bool:
        best = self.progress.best
        better = best is None or (entry["bleu"], -entry["loss"]) > (best["bleu"], -best["loss"])
        if better:
            self.progress.best = entry
            if not self._save_if_possible(BEST):
                self.progress.best, better = best, False
        return better

    def _save_if_possible(self, name: str, whole: bool = False) -> bool:
        """Whether it was written; hours of training are worth more than one checkpoint."""
        try:
            self._save(name, whole)
        except OSError as error:
            self.say(f"step {self.trainer.step}  {name} is not written, the one before it stays: {error}")
            return False
        return True

    def _save(self, name: str, whole: bool = False) -> None:
        state: dict[str, Any] = {"settings": self.settings, "progress": asdict(self.progress)}
        tensors = None
        if whole:
            state["trainer"], tensors = self.trainer.state()
            state["fingerprint"] = self.fingerprint
            if self.log is not None:
                self.log.sync()
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        save_checkpoint(path, self.trainer.model, self.tokenizer, state, tensors)

    def _snapshot(self) -> None:
        if self._save_if_possible(f"{SNAPSHOTS}/{self._snapshot_name()}"):
            for old in self._snapshots()[: -self.average]:
                old.unlink()

    def _finish(self, stop: StopSignal) -> None:
        """Average the snapshots, if there are, and see whether that is better."""
        best, step = self.progress.best, self.trainer.step
        if self.validation is None:
            if best is None or not (self.folder / BEST).exists():
                self._save(BEST)
            else:
                self.say(
                    f"{BEST} stays that of step {best['step']}, BLEU {best['bleu']:.2f}, as nothing was validated now; "
                    f"the weights of step {step} are in {LAST}"
                )
            return
        paths = self._snapshots()
        if self.average < 2 or len(paths) < 2 or not self._may_average():
            return
        model = self.trainer.model
        trained = {name: x.clone() for name, x in model.state_dict().items()}
        try:
            model.load_state_dict(averaged_weights(paths))
        except ValueError as error:
            self.say(f"no average of the last {len(paths)}: {error}")
            return
        measured = self._measure(stop)
        if measured is not None:
            loss, bleu = measured
            entry: dict[str, Any] = {"step": step, "loss": loss, "bleu": bleu, "averaged": len(paths)}
            if self.log is not None:
                self.log.on_validation(**entry, seconds=self.progress.seconds)
            better = self._keep_if_best(entry)
            self.say(
                f"average of the last {len(paths)}  valid loss {loss:.3f}  BLEU {bleu:.2f}{'  best' if better else ''}"
            )
        model.load_state_dict(trained)
        if measured is not None:  # known to the training that goes on from here, or a worse model would become the best
            self.progress.averaged = step
            self._save(LAST, whole=True)

    def _may_average(self) -> bool:
        """Whether this step was validated, and its average is still to be made: not an earlier run's once more."""
        history, step = self.progress.history, self.trainer.step
        return bool(history) and history[-1]["step"] == step and self.progress.averaged != step


def averaged_weights(paths: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of the weights of several checkpoints of one model, in float64 and back.

    Source: Vaswani et al. 2017, section 6.1.
    """
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, x in read_file(path)[0].items():
            if name.startswith("model."):
                name = name.removeprefix("model.")
                total[name] = total[name] + x.double() if name in total else x.double()
    return {name: (x / len(paths)).float() for name, x in total.items()}


def _bar(steps: int, minutes: float | None, shown: bool) -> tqdm:
    off = None if shown else True  # None: no bar where standard error is not a terminal
    if minutes is None:
        return tqdm(total=steps, unit="step", disable=off, dynamic_ncols=True)
    layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{postfix}]"
    return tqdm(total=60 * minutes, bar_format=layout, disable=off, dynamic_ncols=True)
