"""The log of a training: what it says, that nothing is in it twice or missing, and the curves drawn from it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fused_transformer import cli_plot
from fused_transformer import training as training_module
from fused_transformer.__main__ import main
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training_log import LOG, TrainingLog, read_log
from fused_transformer.training_plot import training_curves
from fused_transformer.training_run import TrainingRun
from tests.transformer.test_training_files import Scripted, no_room
from tests.transformer.texts import parallel_lines
from tests.transformer.trainers import tiny_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn(parallel_lines(30)[0], 290)


def training(folder, tokenizer, **options):
    log = TrainingLog(folder, every=2, **options)
    validation = Scripted(1.0, 2.0, 3.0)
    return TrainingRun(
        tiny_trainer(), tokenizer, folder, {}, validation=validation, every=5, average=2, log=log, say=[].append
    )


def resumed(folder, tokenizer, run, **options):
    """A new run behind the state of another, as from its checkpoint."""
    new = training(folder, tokenizer, **options)
    new.trainer.model.load_state_dict(run.trainer.model.state_dict())
    values, tensors = run.trainer.state()
    new.trainer.load_state(values, tensors)
    new.progress = run.progress
    return new


def kinds_and_steps(folder):
    return [(entry["kind"], entry["step"]) for entry in read_log(folder)]


def steps(log, *numbers, loss=1.0):
    for number in numbers:
        log.on_step(
            number, seconds=0.5 * number, took=0.25, tokens=100, loss=loss, learning_rate=1e-3, gradient_norm=2.0
        )


def test_a_run_writes_what_it_did(tmp_path, tokenizer):
    run = training(tmp_path, tokenizer)
    losses, norms = [], []
    train_step = run.trainer.train_step

    def noting():
        losses.append(train_step())
        norms.append(run.trainer.grad_norm)
        return losses[-1]

    run.trainer.train_step = noting
    assert run.run(7)
    entries = read_log(tmp_path)
    assert [(e["kind"], e["step"]) for e in entries] == [
        ("step", 2), ("step", 4), ("validation", 5), ("step", 6), ("validation", 7), ("average", 7),
    ]  # fmt: skip
    trained = [e for e in entries if e["kind"] == "step"]
    for entry, place in zip(trained, (0, 2, 4), strict=True):
        assert entry["loss"] == pytest.approx(sum(losses[place : place + 2]) / 2)
        assert entry["gradient_norm"] == norms[place + 1]
        assert entry["learning_rate"] == run.trainer.schedule.rate(place + 2)
        assert entry["tokens_per_second"] > 0
    assert [e["bleu"] for e in entries if e["kind"] != "step"] == [1.0, 2.0, 3.0] and entries[-1]["averaged"] == 2
    assert [e["seconds"] for e in entries] == sorted(e["seconds"] for e in entries)
    assert run._postfix(1.0).endswith("target tokens/s, BLEU 2.00")


@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_overflows_in_float16_is_no_entry(tmp_path, tokenizer, monkeypatch, at):
    """At 1 the first step; at 3 the one after an entry, which would be there twice. torch's scaler works on CPUs."""
    monkeypatch.setattr(training_module, "_check_precision", lambda precision, device: None)
    trainer = tiny_trainer(precision="float16")
    train_step, calls, losses = trainer.train_step, [], []

    def overflowing():
        calls.append(trainer.step)
        scale = 2.0**30 if len(calls) == at else 2.0**10
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        step, loss = trainer.step, train_step()
        losses.extend([loss] * (trainer.step - step))
        return loss

    trainer.train_step = overflowing
    log = TrainingLog(tmp_path, every=2)
    assert TrainingRun(trainer, tokenizer, tmp_path, {}, log=log, say=[].append).run(4)
    assert calls == sorted([0, 1, 2, 3, at - 1]) and len(losses) == 4
    entries = read_log(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4]
    assert [entry["loss"] for entry in entries] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_the_seconds_of_a_skipped_step_count(tmp_path):
    log = TrainingLog(tmp_path, every=2)
    log.begin(0)
    steps(log, 1)
    log.on_skipped_step(took=0.5)
    steps(log, 2)
    assert [entry["tokens_per_second"] for entry in read_log(tmp_path)] == [200.0]


def test_tokens_a_second_leave_validations_out(tmp_path):
    log = TrainingLog(tmp_path, every=2)
    log.begin(0)
    steps(log, 1, 2)
    log.on_validation(2, seconds=600.0, loss=1.0, bleu=2.0)
    steps(log, 3, 4)
    rates = [entry["tokens_per_second"] for entry in read_log(tmp_path) if entry["kind"] == "step"]
    assert rates == [400.0, 400.0]


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_log_is_that_of_one_run(tmp_path, tokenizer, killed):
    assert training(tmp_path / "whole", tokenizer).run(11)
    run = training(tmp_path / "parts", tokenizer)
    run.run(4)
    run.progress.history.clear()
    if killed:  # it went on, and its last words are torn
        steps(run.log, 5, 6, 7, 8)
        run.log.on_validation(5, seconds=1.0, loss=1.0, bleu=9.0)
        with open(run.log.path, "ab") as file:
            file.write(b'{"kind": "step", "step": 10, "sec')
    again = resumed(tmp_path / "parts", tokenizer, run)
    assert again.run(11)
    wanted = [entry for entry in kinds_and_steps(tmp_path / "whole") if entry != ("validation", 4)]
    found = [entry for entry in kinds_and_steps(tmp_path / "parts") if entry != ("validation", 4)]
    assert found == wanted and len(set(found)) == len(found)
    losses = [[e["loss"] for e in read_log(tmp_path / name) if e["kind"] == "step"] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert not [path for path in (tmp_path / "parts").iterdir() if "unfinished" in path.name]


def test_an_average_made_anew_is_there_once(tmp_path):
    log = TrainingLog(tmp_path, every=1)
    log.begin(0)
    steps(log, 1, 2)
    log.on_validation(2, seconds=1.0, loss=1.0, bleu=2.0)
    log.on_validation(2, seconds=1.0, loss=1.0, bleu=3.0, averaged=2)
    log.close()
    again = TrainingLog(tmp_path, every=1)
    again.begin(2)
    again.on_validation(2, seconds=1.0, loss=1.0, bleu=3.0, averaged=2)
    assert kinds_and_steps(tmp_path) == [("step", 1), ("step", 2), ("validation", 2), ("average", 2)]
    again.begin(0)
    assert read_log(tmp_path) == [], "a new training begins a new log"


def test_a_full_disk_only_delays_entries(tmp_path):
    said = []
    log = TrainingLog(tmp_path, every=1, say=said.append)
    log.begin(0)
    steps(log, 1, 2)
    with no_room():
        steps(log, *range(3, 20))
    assert len(said) == 1 and "log.jsonl can't be written, its entries wait" in said[0]
    assert [entry["step"] for entry in read_log(tmp_path)] < list(range(1, 20))
    steps(log, 20)
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, 21))
    assert (tmp_path / LOG).read_bytes().count(b"\n") == 20, "and no half line in between"


def test_what_is_no_number_is_null(tmp_path):
    log = TrainingLog(tmp_path, every=1)
    log.begin(0)
    log.on_step(1, seconds=1, took=1, tokens=1, loss=2.0, learning_rate=1e-3, gradient_norm=float("inf"))
    assert json.loads((tmp_path / LOG).read_text(), parse_constant=pytest.fail)["gradient_norm"] is None


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TrainingLog(tmp_path, every=1, tensorboard=True)
    log.begin(0)
    steps(log, 1, 2, loss=3.0)
    steps(log, 3, loss=2.0)
    log.on_validation(3, seconds=1.0, loss=1.5, bleu=7.0)
    log.close()
    log = TrainingLog(tmp_path, every=1, tensorboard=True)
    log.begin(2)  # step 3 is done once more
    steps(log, 3, 4, loss=1.0)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 1.0)]
    assert {"train/learning_rate", "train/tokens_per_second", "train/gradient_norm"} <= set(events.Tags()["scalars"])


def test_tensorboard_that_is_missing_is_said(tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'fused-transformer\[tensorboard\]'"):
        TrainingLog(tmp_path, tensorboard=True)


def written(folder, *, validations=True):
    log = TrainingLog(folder, every=1)
    log.begin(0)
    for number in range(1, 9):
        steps(log, number, loss=8 / number)
        if validations and number % 4 == 0:
            log.on_validation(number, seconds=number / 2, loss=9 / number, bleu=10.0 + number)
    if validations:
        log.on_validation(8, seconds=5.0, loss=1.0, bleu=19.0, averaged=2)
    return folder


def lines_of(figure):
    """Of each panel, in order: the lines' points as lists."""
    return [[(*map(list, line.get_data()),) for line in ax.get_lines()] for ax in figure.axes]


def test_curves_show_the_log(tmp_path):
    panels = lines_of(training_curves([written(tmp_path / "run")]).figure)
    assert len(panels) == 6, "loss, learning rate and BLEU; steps and minutes"
    by_steps, by_minutes = panels[0], panels[1]
    assert by_steps[0] == (list(range(1, 9)), [8 / n for n in range(1, 9)])
    assert by_steps[1] == ([4, 8], [9 / 4, 9 / 8]) and by_steps[2] == ([8], [1.0])
    assert by_minutes[0][0] == [pytest.approx(n / 120) for n in range(1, 9)]
    assert panels[2][0][1] == [1e-3] * 8
    assert panels[4] == [([4, 8], [14.0, 18.0]), ([8], [19.0])]


def test_trainings_are_compared_and_panels_without_numbers_left_out(tmp_path):
    names = [written(tmp_path / x / "run", validations=x == "b") for x in ("a", "b")]
    figure = training_curves(names).figure
    assert len(figure.axes) == 6
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a/run", "b/run"]
    assert len(training_curves(names[:1]).figure.axes) == 4, "no BLEU"


def test_the_command_draws(tmp_path, capsys):
    folder = str(written(tmp_path / "run"))
    assert main(["plot", folder]) == 0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", folder, folder + "/" + LOG, "-o", str(tmp_path / "two.svg")]) == 0
    assert "<svg" in (tmp_path / "two.svg").read_text()
    assert capsys.readouterr().out.splitlines() == [f"{folder}/curves.png", str(tmp_path / "two.svg")]


def test_the_command_refuses(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / LOG).write_bytes(b"")
    for arguments, message in (
        ([str(tmp_path / "empty")], f"there is no {LOG} in {tmp_path / 'empty'}"),
        ([str(tmp_path / "begun")], "the log of begun has no entry yet"),
        ([str(written(tmp_path / "run")), "-o", str(tmp_path / "x.bmp")], "x.bmp must end with"),
    ):
        assert cli_plot.main(arguments) == 1
        assert message in capsys.readouterr().err
