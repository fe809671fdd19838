"""Several processes train one model: the same steps as one process takes, one writer, one decision."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fused_transformer import checkpoint
from fused_transformer.checkpoint import BEST, LAST, read_file
from fused_transformer.not_finite import NotFiniteError
from fused_transformer.processes import Processes, own_device
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training_run import TrainingRun
from tests.oracle import assert_equal
from tests.transformer.crew import run_crew
from tests.transformer.texts import parallel_lines
from tests.transformer.trainers import determined, random_corpus, tiny_trainer, weights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
]

# With dropout, where every process has whole batches; without it, where batches are cut among the processes, and where
# they have one sentence each, so that a process has nothing of its own.
COURSES = {
    "whole batches": {"accumulate": 4},
    "an uneven number": {"accumulate": 5, "checkpoint_activations": True},
    "cut batches": {"accumulate": 1, "dropout": 0.0},
    "a sentence each": {"accumulate": 1, "dropout": 0.0, "max_tokens": 14},
}
STEPS = 3


def take_steps(processes: Processes) -> dict:
    results = {}
    for name, options in COURSES.items():
        trainer = tiny_trainer(processes=processes, **options)
        losses = [trainer.train_step() for _ in range(STEPS)]
        results[name] = {"losses": losses, "tokens": trainer.tokens, "norm": trainer.grad_norm, **weights(trainer)}
    return results


def test_two_processes_take_the_steps_of_one(tmp_path):
    alone = take_steps(Processes())
    first, second = run_crew(take_steps, 2, tmp_path)
    assert_equal(second, first)
    for name, expected in alone.items():
        torch.testing.assert_close(
            determined(first[name]), determined(expected), rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text
        )
    assert alone["whole batches"]["losses"] != first["cut batches"]["losses"]


class Scripted:
    """A validation that is never needed twice, and knows in which processes it ran."""

    def __init__(self) -> None:
        self.measured = 0

    def measure(self, translator, on_batch):
        self.measured += 1
        return 1.0, float(self.measured)


def vocabulary() -> Tokenizer:
    return Tokenizer.learn(parallel_lines(30)[0], 290)


def train(processes: Processes, folder: Path, steps: int, resume: bool, stop_at: int | None = None) -> dict:
    """A run of its own in each process; process 1 alone gets a signal after step `stop_at`."""
    trainer, lines, validation = tiny_trainer(processes=processes), [], Scripted()
    run = TrainingRun(trainer, vocabulary(), folder, {}, validation=validation, every=3, average=2, say=lines.append)
    if resume:
        tensors, state = read_file(folder / LAST)
        trainer.model.load_state_dict({n[6:]: x for n, x in tensors.items() if n.startswith("model.")})
        run.resume(state, tensors)
    train_step = trainer.train_step

    def step_then_signal():
        value = train_step()
        if processes.rank == 1 and trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what a terminal has sent already
        return value

    trainer.train_step = step_then_signal
    done = run.run(steps)
    return {"done": done, "step": trainer.step, "lines": lines, "measured": validation.measured, **weights(trainer)}


def test_one_writes_all_stop_and_another_number_of_processes_goes_on(tmp_path):
    """A signal to one of two processes stops both; one process alone finishes, and then two find nothing to do."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = train(Processes(), whole, 9, resume=False)
    first, second = run_crew(train, 2, tmp_path, parts, 9, False, 5)
    assert (first["done"], second["done"], first["step"], second["step"]) == (False, False, 5, 5)
    assert first["measured"] == 1 and second["measured"] == 0
    assert len(first["lines"]) == 1 and second["lines"] == []
    assert read_file(parts / LAST)[1]["trainer"]["step"] == 5

    resumed = train(Processes(), parts, 9, resume=True)
    assert resumed["done"] and resumed["step"] == 9
    names = weights(tiny_trainer()).keys()
    torch.testing.assert_close(
        *(determined({n: x[n] for n in names}) for x in (resumed, expected)), rtol=1e-4, atol=1e-6
    )

    first, second = run_crew(train, 2, tmp_path, parts, 12, True)
    assert first["done"] and second["done"] and second["step"] == 12
    assert_equal({n: first[n] for n in names}, {n: second[n] for n in names})
    assert [e["step"] for e in read_file(parts / LAST)[1]["progress"]["history"]] == [3, 6, 9, 12]
    assert read_file(parts / BEST)[1]["progress"]["best"] == {"step": 9, "loss": 1.0, "bleu": 3.0, "averaged": 2}


def meet_errors(processes: Processes, folder: Path) -> list[str]:
    """The message of each error, as this process has it."""
    messages = []

    def caught(kind, work) -> None:
        try:
            work()
        except kind as error:
            messages.append(str(error))

    def spoil(asked):
        if asked.tolist() == bad:
            trainer.model.encoder.layers[0].norm1.weight.data.fill_(float("nan"))
        else:
            trainer.model.load_state_dict(sound)
        return batch(asked)

    trainer = tiny_trainer(processes=processes)
    bad = next(iter(tiny_trainer().batches)).tolist()  # the first of the step's batches, which process 0 has
    batch, trainer.corpus.batch, sound = trainer.corpus.batch, spoil, weights(trainer)
    caught(NotFiniteError, trainer.train_step)

    other = tiny_trainer(processes=processes, corpus=random_corpus(90 - processes.rank))
    caught(ValueError, lambda: TrainingRun(other, vocabulary(), folder, {}).run(1))

    full = OSError(28, "No space left on device")
    checkpoint.os.fsync = lambda number: (_ for _ in ()).throw(full)
    caught(OSError, lambda: TrainingRun(tiny_trainer(processes=processes), vocabulary(), folder, {}).run(1))
    return [*messages, ",".join(map(str, sorted(i + 1 for i in bad)))]


def test_an_error_of_one_process_is_everyones(tmp_path):
    first, second = run_crew(meet_errors, 2, tmp_path, tmp_path)
    assert first == second
    not_finite, text, full, lines = first
    assert f"the loss became nan at step 1, in the batch of lines {lines.replace(',', ', ')};" in not_finite
    assert text == "process 1 has not the text, the options and the checkpoint of process 0"
    assert "No space left on device" in full and LAST in full


def wait_for_the_first(processes: Processes, patient: bool) -> str:
    """The first process works for longer than processes wait for each other's gradients."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.3))
    if not patient:
        processes._group = dist.group.WORLD
    try:
        return processes.once(lambda: time.sleep(1.0) or "validated")
    except RuntimeError as error:
        return str(error)


def test_the_others_wait_for_the_first_however_long_it_takes(tmp_path):
    assert run_crew(wait_for_the_first, 2, tmp_path, True) == ["validated"] * 2
    assert "imed out" in run_crew(wait_for_the_first, 2, tmp_path, False)[1], "on the group of the gradients"


def test_batches_are_shared_out_evenly():
    processes, batches = Processes(), [torch.arange(7), torch.arange(7, 10), torch.arange(10, 15)]
    for world in (1, 2, 3):
        processes.world = world
        assert_equal(processes.pieces(batches), batches)
    for world in (4, 6, 7, 40):
        processes.world = world
        pieces = processes.pieces(batches)
        assert len(pieces) >= world and sorted(torch.cat(pieces).tolist()) == list(range(15))
        sizes = [len(piece) for piece in pieces if len(piece)]
        assert max(sizes) <= -(-7 // (len(pieces) // 3))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("cuda") == torch.device("cuda") and own_device("cuda:1").index == 1 and chosen == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_device("cpu") == torch.device("cpu")
    assert own_device("cuda") == torch.device("cuda:1") == chosen[0]
    with pytest.raises(ValueError, match="2 processes cannot share cuda:0"):
        own_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes need as many GPUs, and torch finds 2 here"):
        own_device("cuda")
    with pytest.raises(ValueError, match="there is no device 'cuda:7': torch finds 2 GPUs here"):
        own_device("cuda:7")
    with pytest.raises(ValueError, match="there is no device 'granite'"):
        own_device("granite")
