"""The train and translate commands, end to end and with everything that can be wrong with their input."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_transformer import TransformerConfig, cli_train, cli_translate
from fused_transformer.checkpoint import load_checkpoint, read_file
from fused_transformer.settings import PRESETS, chosen, model_config, training_options
from fused_transformer.training import TrainingOptions
from tests.transformer.crew import run_crew
from tests.transformer.texts import parallel_lines, write_parallel

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--preset", "tiny", "--d-model", "32", "--d-feedforward", "64", "--vocab-size", "320", "--max-tokens", "400"]
TINY += ["--warmup-steps", "20", "--learning-rate-factor", "0.25", "--threads", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with text files and a short training in `model`, and what the training printed."""
    folder = tmp_path_factory.mktemp("trained")
    source, target = write_parallel(folder, 300)
    valid_source, valid_target = write_parallel(folder, 20, "valid", seed=1)
    arguments = ["--valid-source", valid_source, "--valid-target", valid_target]
    arguments += ["--test-source", valid_source, "--test-target", valid_target]
    command = [sys.executable, "-m", "fused_transformer", "train", "--source", source, "--target", target, *arguments]
    command += ["--output", str(folder / "model"), "--steps", "50", "--every", "20", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def train(folder, *more, output="model", steps="6"):
    source, target = write_parallel(folder, 60)
    arguments = ["--source", source, "--target", target, "--output", str(folder / output), "--steps", steps]
    return cli_train.main([*arguments, *TINY, *more])


def translate(monkeypatch, capsysbinary, text, *arguments):
    """Status, standard output and standard error of a translation of `text` (bytes) from standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    status = cli_translate.main(list(arguments))
    out, err = capsysbinary.readouterr()
    return status, out.decode(), err.decode()


def test_training_reports_and_keeps_what_it_promises(trained):
    folder, printed = trained
    lines = printed.splitlines()
    assert lines[0].startswith("300 sentence pairs, ")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["20", "40", "50"]
    assert all("train loss" in line and "valid loss" in line and "BLEU" in line for line in lines[1:4])
    assert any(line.startswith("average of the last 3") for line in lines)
    assert lines[-1].startswith("test BLEU ") and "beam 4" in lines[-1] and "tok:13a" in lines[-1]
    files = {"best.safetensors", "last.safetensors", "log.jsonl", "snapshots"}
    assert {path.name for path in (folder / "model").iterdir()} == files
    _, state = read_file(folder / "model" / "last.safetensors")
    assert state["trainer"]["step"] == 50 and state["settings"]["d_model"] == 32
    losses = [entry["loss"] for entry in state["progress"]["history"]]
    assert losses == sorted(losses, reverse=True), "it learns"


def test_translations_keep_the_lines(trained, monkeypatch, capsysbinary):
    model = str(trained[0] / "model")
    text = "un chien voit\n\n  \n日本 🦊 Ærø\nun chien voit\r\nun  chien   voit".encode()
    status, out, err = translate(monkeypatch, capsysbinary, text, "--model", model, "--beam-size", "2")
    assert status == 0 and err == ""
    lines = out.split("\n")
    assert len(lines) == 7 and lines[-1] == "", "six lines, each with its end"
    assert lines[1] == lines[2] == ""
    assert lines[0] == lines[4] == lines[5] != ""


def test_translations_do_not_depend_on_how_lines_are_read(trained, monkeypatch, capsysbinary, tmp_path):
    model = str(trained[0] / "model")
    source = parallel_lines(23, seed=5)[0]
    text = "".join(line + "\n" for line in source)
    whole = translate(monkeypatch, capsysbinary, text.encode(), "--model", model)[1]
    chunked = translate(monkeypatch, capsysbinary, text.encode(), "--model", model, "--chunk", "4")[1]
    assert whole == chunked and whole.count("\n") == 23
    (tmp_path / "in").write_text(text, encoding="utf-8")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert cli_translate.main(["--model", model + "/best.safetensors", *files]) == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == whole


def test_n_best_lists_have_numbers_and_falling_scores(trained, monkeypatch, capsysbinary):
    model = str(trained[0] / "model")
    arguments = ["--model", model, "--top-beams", "3", "--chunk", "1"]
    status, out, _ = translate(monkeypatch, capsysbinary, b"un chat\n\ndeux chats\n", *arguments)
    rows = [line.split(" ||| ") for line in out.splitlines()]
    assert status == 0
    assert [row[0] for row in rows] == ["0"] * 3 + ["1"] + ["2"] * 3
    for number in "02":
        scores = [float(score) for n, _, score in rows if n == number]
        assert scores == sorted(scores, reverse=True) and scores[0] < 0
    assert rows[3][1:] == ["", "0.0000"]
    assert len({text for n, text, _ in rows if n == "0"}) > 1
    best = translate(monkeypatch, capsysbinary, b"un chat\n", "--model", model)[1]
    assert best == rows[0][1] + "\n"


@pytest.mark.parametrize("weights", [["--int8"], ["--weights", "bfloat16"]], ids=" ".join)
def test_smaller_weights_translate_too(trained, monkeypatch, capsysbinary, weights):
    model = str(trained[0] / "model")
    status, out, err = translate(monkeypatch, capsysbinary, b"un chat\n\nun chien\n", "--model", model, *weights)
    lines = out.splitlines()
    assert (status, err, len(lines), lines[1]) == (0, "", 3, "") and lines[0] and lines[2]


def test_nothing_in_nothing_out(trained, monkeypatch, capsysbinary):
    assert translate(monkeypatch, capsysbinary, b"", "--model", str(trained[0] / "model")) == (0, "", "")


def test_refused_translations(trained, monkeypatch, capsysbinary, tmp_path):
    model = str(trained[0] / "model")

    def refused(*arguments, text=b"un\n"):
        status, out, err = translate(monkeypatch, capsysbinary, text, *arguments)
        assert status == 1 and out == "" and err.startswith("translate: ") and err.count("\n") == 1
        return err

    assert "there is no checkpoint at" in refused("--model", str(tmp_path / "nowhere"))
    assert "No such file" in refused("--model", model, "--input", str(tmp_path / "nowhere"))
    assert "standard input: line 1 is not valid UTF-8" in refused("--model", model, text=b"\xff\xfe\n")
    assert "top_beams must be between 1 and beam_size (4), got 5" in refused("--model", model, "--top-beams", "5")
    assert "--chunk must be positive" in refused("--model", model, "--chunk", "0")
    assert "length_penalty must be finite" in refused("--model", model, "--length-penalty", "-1")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((trained[0] / "model" / "best.safetensors").read_bytes()[:-9])
    assert "damaged.safetensors is damaged" in refused("--model", str(damaged))


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path, capsys):
    assert train(tmp_path, output="whole", steps="9") == 0
    assert train(tmp_path, output="parts", steps="4") == 0
    assert train(tmp_path, "--resume", output="parts", steps="9") == 0
    assert "--resume" not in capsys.readouterr().err
    whole, state = read_file(tmp_path / "whole" / "last.safetensors")
    parts, resumed_state = read_file(tmp_path / "parts" / "last.safetensors")
    assert whole.keys() == parts.keys()
    for name, x in whole.items():
        assert torch.equal(parts[name], x), name
    assert state["trainer"] == resumed_state["trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_a_checkpoint_that_resumes(tmp_path, number):
    source, target = write_parallel(tmp_path, 60)
    command = [sys.executable, "-m", "fused_transformer", "train", "--source", source, "--target", target]
    command += ["--output", str(tmp_path / "model"), "--steps", "1000000", *TINY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "sentence pairs" in process.stdout.readline()
        time.sleep(1.0)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped and saved after step" in out and "Traceback" not in err
    _, _, state, _ = load_checkpoint(tmp_path / "model" / "last.safetensors")
    steps = state["trainer"]["step"]
    assert train(tmp_path, "--resume", steps=str(steps + 2)) == 0
    assert read_file(tmp_path / "model" / "last.safetensors")[1]["trainer"]["step"] == steps + 2


def refused_training(capsys, *arguments):
    assert cli_train.main(list(arguments)) == 1
    err = capsys.readouterr().err
    assert err.startswith("train: ") and err.count("\n") == 1
    return err


def test_refused_texts(tmp_path, capsys):
    source, target = write_parallel(tmp_path, 5)
    output = str(tmp_path / "model")

    def refused(source_bytes=None, target_bytes=None, *more):
        paths = []
        for path, content in ((source, source_bytes), (target, target_bytes)):
            other = path + ".other"
            Path(other).write_bytes(Path(path).read_bytes() if content is None else content)
            paths.append(other)
        return refused_training(capsys, "--source", paths[0], "--target", paths[1], "--output", output, *TINY, *more)

    assert "train.fr.other is empty" in refused(b"")
    assert "train.en.other is empty" in refused(None, b"")
    err = refused(None, b"one\ntwo\n")
    assert "train.fr.other has 5 and" in err and "train.en.other has 2" in err
    assert "train.en.other: line 3 is not valid UTF-8" in refused(None, b"a\nb\n\xe9t\xe9\nc\nd\n")
    assert "text without a word" in refused(b"\n\n", b"\n \n")
    assert "have no pair of 1 to" in refused(b"\n\n", b"one\ntwo\n")
    assert "have no pair of 1 to 3 subwords" in refused(None, None, "--max-length", "3")
    assert "vocab_size 100 is too small" in refused(None, None, "--vocab-size", "100")
    assert "num_heads must divide d_model" in refused(None, None, "--num-heads", "5")
    assert "--valid-source and --valid-target go together" in refused(None, None, "--valid-source", source)
    assert "--steps must be positive" in refused(None, None, "--steps", "0")
    assert "--log-every must be positive" in refused(None, None, "--log-every", "0")
    for option in ("--minutes", "--learning-rate-factor", "--clip-norm", "--dropout", "--label-smoothing"):
        for value in ("inf", "nan"):
            assert f"{option} must be a finite number, got {value}" in refused(None, None, option, value)
    err = refused_training(capsys, "--source", str(tmp_path / "nowhere"), "--target", target, "--output", output)
    assert "No such file" in err and "nowhere" in err
    assert not os.path.exists(output), "nothing is made ahead of an error"


def test_empty_and_overlong_pairs_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "a").write_text("un chien\n\nun chat " + 99 * "chat " + "\nun chat\n", encoding="utf-8")
    (tmp_path / "b").write_text("a dog\na\na cat\na cat\n", encoding="utf-8")
    arguments = ["--source", str(tmp_path / "a"), "--target", str(tmp_path / "b"), "--output", str(tmp_path / "model")]
    assert cli_train.main([*arguments, *TINY, "--max-length", "30", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "left out 2 of 4 pairs: empty, or over 30 subwords" in out
    assert "2 sentence pairs, " in out


def test_refused_resumptions(tmp_path, capsys):
    source, target = write_parallel(tmp_path, 60)
    files = ["--source", source, "--target", target, "--output", str(tmp_path / "model")]
    assert "there is no checkpoint at" in refused_training(capsys, *files, "--resume")
    assert train(tmp_path, steps="2") == 0
    last = (tmp_path / "model" / "last.safetensors").read_bytes()
    capsys.readouterr()
    assert "holds a training already: go on with --resume" in refused_training(capsys, *files, *TINY)
    err = refused_training(capsys, *files, "--resume", "--d-model", "64", "--seed", "9")
    assert "--d-model 64 (was 32), --seed 9 (was 1)" in err
    write_parallel(tmp_path, 61)
    assert "not the text this training was begun with" in refused_training(capsys, *files, "--resume")
    (tmp_path / "model" / "last.safetensors").write_bytes(last[:-5])
    assert "last.safetensors is damaged" in refused_training(capsys, *files, "--resume")
    assert (tmp_path / "model" / "last.safetensors").read_bytes() == last[:-5]


def test_the_recipe_reaches_the_trainer(tmp_path, capsys):
    recipe = ["--accumulate", "3", "--precision", "bfloat16", "--checkpoint-activations"]
    assert train(tmp_path, *recipe, steps="2") == 0
    _, state = read_file(tmp_path / "model" / "last.safetensors")
    options = state["trainer"]["options"]
    assert (options["accumulate"], options["precision"], state["trainer"]["step"]) == (3, "bfloat16", 2)
    assert state["settings"]["accumulate"] == 3
    assert train(tmp_path, "--resume", *recipe, steps="3") == 0
    capsys.readouterr()
    assert train(tmp_path, "--resume", "--accumulate", "4", steps="4") == 1
    assert "--accumulate 4 (was 3)" in capsys.readouterr().err
    assert train(tmp_path, "--precision", "float16", "--device", "cpu", output="other") == 1
    assert "precision float16 is for GPUs" in capsys.readouterr().err
    assert train(tmp_path, "--device", "cuda:99", output="other") == 1
    assert "there is no device 'cuda:99'" in capsys.readouterr().err


def test_a_checkpoint_from_before_a_setting_existed_has_its_default():
    arguments = argparse.Namespace(preset=None, **dict.fromkeys(PRESETS["tiny"]))
    saved = {name: value for name, value in PRESETS["tiny"].items() if name not in ("accumulate", "precision")}
    assert chosen(arguments, saved) == PRESETS["tiny"]
    arguments.accumulate = 2
    with pytest.raises(ValueError, match=r"--accumulate 2 \(was 1\)"):
        chosen(arguments, saved)


@pytest.mark.slow
def test_two_processes_train_and_one_goes_on(tmp_path):
    """As torchrun starts them; the files are those of one process, up to rounding."""
    source, target = write_parallel(tmp_path, 60)
    files = ["--source", source, "--target", target, "--valid-source", source, "--valid-target", target]
    files += ["--test-source", source, "--test-target", target, "--bleu-sentences", "5"]
    more = ["--accumulate", "2", "--every", "2", *TINY]
    two = [*files, "--output", str(tmp_path / "two"), *more]
    assert run_crew(cli_train.main, 2, tmp_path, [*two, "--steps", "4"], join=False) == [0, 0]
    assert cli_train.main([*two, "--resume", "--steps", "5"]) == 0
    assert cli_train.main([*files, "--output", str(tmp_path / "one"), "--steps", "5", *more]) == 0
    histories = [read_file(tmp_path / name / "last.safetensors")[1]["progress"]["history"] for name in ("two", "one")]
    assert [entry["step"] for entry in histories[0]] == [2, 4, 5]
    for entry, expected in zip(*histories, strict=False):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert run_crew(cli_train.main, 2, tmp_path, [*two, "--steps", "4"], join=False) == [1, 1], (
        "holds a training already"
    )


def test_presets_are_whole():
    for preset, settings in PRESETS.items():
        config, options = model_config(settings, 5000), training_options(settings)
        assert config.to_dict().items() >= {name: settings[name] for name in ("d_model", "dropout")}.items(), preset
        assert options.max_tokens == settings["max_tokens"]
    assert model_config(PRESETS["base"], 37000) == TransformerConfig(source_vocab_size=37000), "the paper's"
    assert training_options(PRESETS["base"]) == TrainingOptions()


def test_resuming_needs_no_settings(tmp_path):
    assert train(tmp_path, steps="2") == 0
    source, target = (str(tmp_path / f"train.{language}") for language in ("fr", "en"))
    files = ["--source", source, "--target", target, "--output", str(tmp_path / "model")]
    assert cli_train.main([*files, "--resume", "--steps", "3"]) == 0
