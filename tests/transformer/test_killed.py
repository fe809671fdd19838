"""kill -9 at any moment, amid a write too, costs the steps since the last checkpoint and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from fused_transformer import checkpoint
from fused_transformer.checkpoint import LAST, read_file
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training_run import SNAPSHOTS, TrainingRun
from tests.oracle import assert_equal
from tests.transformer.crew import PRELOADED
from tests.transformer.texts import parallel_lines
from tests.transformer.trainers import tiny_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 40
# Where in the writing of a file the process dies, of which file, and which time it writes it.
MOMENTS = [
    ("half of it", "last", 2),
    ("ahead of fsync", "step", 2),
    ("ahead of the name", "last", 1),
    ("behind the name", "last", 1),
]


class ByWeights:
    """A validation that a resumed run repeats exactly: BLEU is made of the weights."""

    def measure(self, translator, on_batch):
        return 1.0, sum(x.double().sum().item() for x in translator.model.state_dict().values()) % 1.0


def die(moment: str, name: str, time: int) -> None:
    """Kill this process in its `time`-th write of the file that begins with `name`."""
    fsync, replace, calls = os.fsync, os.replace, {"fsync": 0, "replace": 0}

    def counted(call: str, path: str) -> bool:
        calls[call] += Path(path).name.startswith(f".{name}")
        return calls[call] == time and Path(path).name.startswith(f".{name}")

    def dying_fsync(number: int) -> None:
        if counted("fsync", os.readlink(f"/proc/self/fd/{number}")):
            if moment == "half of it":
                os.ftruncate(number, os.fstat(number).st_size // 2)
            if moment in ("half of it", "ahead of fsync"):
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    def dying_replace(source, target) -> None:
        dying = counted("replace", source)
        if dying and moment == "ahead of the name":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if dying and moment == "behind the name":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.os.fsync, checkpoint.os.replace = dying_fsync, dying_replace


def train(folder: Path, vocabulary: bytes, moment: tuple[str, str, int] | None = None) -> None:
    """Begin or go on, with three files written at each second step."""
    torch.set_num_threads(1)
    trainer = tiny_trainer(max_tokens=40, accumulate=2)
    tokenizer = Tokenizer(vocabulary)
    run = TrainingRun(trainer, tokenizer, folder, {}, validation=ByWeights(), every=2, average=3, say=lambda line: None)
    if (folder / LAST).exists():
        tensors, state = read_file(folder / LAST)
        trainer.model.load_state_dict({n[6:]: x for n, x in tensors.items() if n.startswith("model.")})
        run.resume(state, tensors)
    if moment is not None:
        die(*moment)
    run.run(STEPS)


def all_files_are_whole(folder: Path) -> int:
    """The step of the last checkpoint."""
    for path in [*folder.glob("*.safetensors"), *(folder / SNAPSHOTS).glob("*.safetensors")]:
        read_file(path)
    return read_file(folder / LAST)[1]["trainer"]["step"]


def test_a_training_killed_at_any_moment_ends_as_the_undisturbed_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    vocabulary = Tokenizer.learn(parallel_lines(30)[0], 290).to_bytes()
    train(whole, vocabulary)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    choose, step, halves = random.Random(3), 0, 0
    for moment in [*MOMENTS, None, None]:
        process = context.Process(target=train, args=(killed, vocabulary, moment), daemon=True)
        process.start()
        if moment is None:  # at whatever moment this is
            last = (killed / LAST).stat().st_mtime_ns
            deadline = time.monotonic() + 60
            while (killed / LAST).stat().st_mtime_ns == last and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(choose.random() * 0.02)
            process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL or moment is None  # which a busy machine may come too late for
        halves += len(list(killed.rglob(checkpoint.UNFINISHED)))
        before, step = step, all_files_are_whole(killed)
        assert before <= step
    assert halves >= 3, "writes that were broken off"

    train(killed, vocabulary)
    assert list(killed.rglob(checkpoint.UNFINISHED)) == []
    (tensors, state), (expected, expected_state) = read_file(killed / LAST), read_file(whole / LAST)
    assert_equal(tensors, expected)
    assert state["trainer"] == expected_state["trainer"]
    history = [[{**entry, "seconds": 0, "train_loss": 0} for entry in s["progress"]["history"]]
               for s in (state, expected_state)]  # fmt: skip
    assert history[0] == history[1]
    assert all_files_are_whole(killed) == STEPS
    for path in whole.rglob("*.safetensors"):
        assert_equal(read_file(killed / path.relative_to(whole))[0], read_file(path)[0])
