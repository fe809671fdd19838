"""What a training leaves in its folder when writing fails, or a process was killed: whole checkpoints, and no more."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from fused_transformer.checkpoint import BEST, LAST, read_file
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training_log import TrainingLog, read_log
from fused_transformer.training_run import SNAPSHOTS, TrainingRun
from tests.oracle import assert_equal
from tests.transformer.texts import parallel_lines
from tests.transformer.trainers import tiny_trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def no_room():
    """No file may grow beyond 1000 bytes: a write that the system breaks off halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Scripted:
    """A validation with these BLEUs, one after another, and 0 from then on."""

    def __init__(self, *bleu):
        self.bleu = list(bleu)

    def measure(self, translator, on_batch):
        return 1.0, self.bleu.pop(0) if self.bleu else 0.0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn(parallel_lines(30)[0], 290)


def run_in(folder, tokenizer, lines, full=range(0)):
    """A run of a checkpoint each second step, and its trainer; no room for files in steps of `full`."""
    trainer = tiny_trainer()
    run = TrainingRun(
        trainer, tokenizer, folder, {}, validation=Scripted(1.0, 3.0, 3.0, 2.0), every=2, average=2, say=lines.append
    )
    check_point = run._check_point

    def in_a_full_folder(stop):
        if trainer.step not in full:
            return check_point(stop)
        with no_room():
            return check_point(stop)

    run._check_point = in_a_full_folder
    return run, trainer


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_training_goes_on_and_the_old_checkpoints_stay(tmp_path, tokenizer):
    lines = []
    run, trainer = run_in(tmp_path, tokenizer, lines, full=(4, 6))
    train_step, seen = trainer.train_step, {}

    def remembering():
        seen[trainer.step] = {name: read_file(tmp_path / name)[1] for name in (LAST, BEST) if trainer.step}
        return train_step()

    run.run(2)
    trainer.train_step = remembering
    assert run.run(7)
    for step in (4, 5, 6):  # nothing was written at 4 and 6
        assert seen[step][LAST]["trainer"]["step"] == 2
        assert seen[step][BEST]["progress"]["best"]["step"] == 2, "what is not written is not the best"
    for name in (BEST, LAST, f"{SNAPSHOTS}/step-000000004.safetensors"):
        assert any(f"step 4  {name} is not written, the one before it stays: [Errno 27]" in line for line in lines)
    assert files(tmp_path) == [BEST, LAST, f"{SNAPSHOTS}/step-000000002.safetensors",
                               f"{SNAPSHOTS}/step-000000007.safetensors"]  # fmt: skip

    assert read_file(tmp_path / BEST)[1]["progress"]["best"]["step"] == 7, "the best of those that were written"

    undisturbed, other = run_in(tmp_path / "other", tokenizer, [])
    (tmp_path / "other").mkdir()
    assert undisturbed.run(7)
    assert_equal(weights(trainer), weights(other))


def test_without_room_at_the_end_it_fails_and_the_old_checkpoint_resumes(tmp_path, tokenizer):
    run, _ = run_in(tmp_path, tokenizer, [], full=(4,))
    assert run.run(2)
    before = (tmp_path / LAST).read_bytes()
    with no_room(), pytest.raises(OSError, match=r"File too large: '.*last\.safetensors'"):
        run.run(3)
    assert (tmp_path / LAST).read_bytes() == before
    assert files(tmp_path) == [BEST, LAST, f"{SNAPSHOTS}/step-000000002.safetensors"], "nothing half-written"
    resumed, trainer = run_in(tmp_path, tokenizer, [])
    tensors, state = read_file(tmp_path / LAST)
    trainer.model.load_state_dict({n[6:]: x for n, x in tensors.items() if n.startswith("model.")})
    resumed.resume(state, tensors)
    assert resumed.run(3)


def test_a_damaged_snapshot_costs_the_average_alone(tmp_path, tokenizer):
    lines = []
    run, trainer = run_in(tmp_path, tokenizer, lines)
    assert run.run(4)
    snapshot = tmp_path / SNAPSHOTS / "step-000000004.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-7])
    before, lines[:], run.progress.averaged = weights(trainer), [], 0
    run._finish(None)
    assert len(lines) == 1 and lines[0].startswith("no average of the last 2: ")
    assert f"{snapshot.name} is damaged" in lines[0]
    assert_equal(weights(trainer), before)
    assert snapshot.exists()


def test_what_a_killed_training_left_is_removed(tmp_path, tokenizer):
    """Half-written files, and snapshots beyond the step that is gone on from, which an average would take."""
    run, _ = run_in(tmp_path, tokenizer, [])
    assert run.run(4)
    left = [tmp_path / f".{LAST}.1.unfinished", *(tmp_path / SNAPSHOTS / name for name in (
        ".step-000000004.safetensors.1.unfinished", "step-000000006.safetensors"))]  # fmt: skip
    for path in left:
        path.write_bytes(b"something")
    kept = set(files(tmp_path)) - {str(path.relative_to(tmp_path)) for path in left}
    assert run.run(4)
    assert set(files(tmp_path)) == kept
    fresh, _ = run_in(tmp_path, tokenizer, [])
    assert fresh.run(1)
    assert not (tmp_path / SNAPSHOTS / "step-000000002.safetensors").exists()


def gone_on(folder, tokenizer, steps, *bleu, validated=True):
    """What is said when the training in `folder` goes on up to `steps`; validations are scripted, or there are none."""
    lines, trainer = [], tiny_trainer()
    run = TrainingRun(trainer, tokenizer, folder, {}, validation=Scripted(*bleu) if validated else None, every=2,
                      average=2, log=TrainingLog(folder, every=2), say=lines.append)  # fmt: skip
    if (folder / LAST).exists():
        tensors, state = read_file(folder / LAST)
        trainer.model.load_state_dict({n[6:]: x for n, x in tensors.items() if n.startswith("model.")})
        run.resume(state, tensors)
    assert run.run(steps)
    return lines


def averages(folder):
    return [entry["step"] for entry in read_log(folder) if entry["kind"] == "average"]


def test_a_resumed_training_knows_of_an_average_that_is_the_best(tmp_path, tokenizer):
    gone_on(tmp_path, tokenizer, 4, 10.0, 11.0, 15.0)
    best = (tmp_path / BEST).read_bytes()
    assert read_file(tmp_path / LAST)[1]["progress"]["best"] == read_file(tmp_path / BEST)[1]["progress"]["best"]
    gone_on(tmp_path, tokenizer, 6, 12.0, 9.0)
    assert (tmp_path / BEST).read_bytes() == best
    assert averages(tmp_path) == [4, 6]
    gone_on(tmp_path, tokenizer, 8, 16.0, 9.0)
    assert read_file(tmp_path / BEST)[1]["progress"]["best"] == {"step": 8, "loss": 1.0, "bleu": 16.0}


def test_without_validation_the_best_stays_that_of_the_validated_ones(tmp_path, tokenizer):
    gone_on(tmp_path, tokenizer, 4, 10.0, 11.0, 9.0)
    best = (tmp_path / BEST).read_bytes()
    said = gone_on(tmp_path, tokenizer, 6, validated=False)
    assert said == ["best.safetensors stays that of step 4, BLEU 11.00, as nothing was validated now; the weights of "
                    "step 6 are in last.safetensors"]  # fmt: skip
    assert (tmp_path / BEST).read_bytes() == best and read_file(tmp_path / LAST)[1]["trainer"]["step"] == 6
    (tmp_path / BEST).unlink()
    assert gone_on(tmp_path, tokenizer, 6, validated=False) == []
    assert (tmp_path / BEST).exists(), "none was left to keep"


def test_an_average_is_not_made_twice_nor_of_an_earlier_window(tmp_path, tokenizer):
    assert "average of the last 2" in gone_on(tmp_path, tokenizer, 4, 10.0, 11.0, 9.0)[-1]
    assert gone_on(tmp_path, tokenizer, 4, 99.0) == [] and averages(tmp_path) == [4]
    _, state = read_file(tmp_path / LAST)
    gone_on(tmp_path, tokenizer, 6, validated=False)
    assert gone_on(tmp_path, tokenizer, 6, 99.0) == [], "the snapshots are those of steps 2 and 4"
    assert averages(tmp_path) == [4]
    assert read_file(tmp_path / LAST)[1]["progress"]["best"] == state["progress"]["best"]
