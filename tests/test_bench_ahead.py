"""bench.ahead: that steps are counted, of a model that was trained a little."""

from __future__ import annotations

import re

import pytest
import torch

from bench import ahead
from fused_transformer import PackedTransformer, SearchOptions, cli_train, generate, inference
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from tests.transformer.texts import write_parallel


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setattr(inference, "LEAST_SCREENED", inference.LEAST_SCREENED)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_steps_of_a_model_and_its_draft(tmp_path, capsys):
    source, target = write_parallel(tmp_path, 200)
    sizes = ["--d-model", "32", "--d-feedforward", "64", "--vocab-size", "320", "--max-tokens", "800"]
    files = ["--source", source, "--target", target, "--output", str(tmp_path / "run")]
    assert cli_train.main([*files, "--preset", "tiny", *sizes, "--steps", "40", "--threads", "1"]) == 0
    capsys.readouterr()
    assert ahead.main(["--model", str(tmp_path / "run"), "--source", source, "--sentences", "5"]) == 0
    line = r"beam size (\d): (\d+) tokens in (\d+) steps of the model, ([\d.]+) .* (\d+) of the draft"
    told = re.findall(line, capsys.readouterr().out)
    assert [int(row[0]) for row in told] == [1, 4]
    for beam_size, tokens, steps, rate, drafts in told:
        most = 4 if beam_size == "1" else 3
        assert 1 <= float(rate) <= most and int(steps) <= int(tokens) and int(drafts) <= (most - 1) * int(steps)
    model, tokenizer, _, _ = load_checkpoint(find_checkpoint(tmp_path / "run"))
    greedy, packed = 0, PackedTransformer(model.eval(), look_ahead=False)
    with open(source, encoding="utf-8") as lines:
        for tokens in tokenizer.encode([next(lines).strip() for _ in range(5)]):
            sentence = torch.tensor([[*tokens, model.config.eos_idx]])
            found = generate(packed, sentence, options=SearchOptions(beam_size=1))
            greedy += int(found.lengths + found.finished)
    assert greedy == int(told[0][1])


def test_no_text_is_an_error(tmp_path, capsys):
    source, target = write_parallel(tmp_path, 60)
    files = ["--source", source, "--target", target, "--output", str(tmp_path / "run")]
    sizes = ["--d-model", "16", "--d-feedforward", "16", "--vocab-size", "300", "--max-tokens", "400"]
    assert cli_train.main([*files, "--preset", "tiny", *sizes, "--steps", "1", "--threads", "1"]) == 0
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SystemExit):
        ahead.main(["--model", str(tmp_path / "run"), "--source", str(tmp_path / "empty")])
    assert "holds no text" in capsys.readouterr().err
