"""bench.quality: a table of what was trained, from the runs' own files."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch

from bench import moses, quality, report_training
from bench.report import ROOT, newest
from fused_transformer import cli_train


def test_a_run_becomes_a_row(tmp_path, capsys):
    (tmp_path / "en").write_text("One two three\nfour Five\nsix\n" * 5)
    (tmp_path / "fr").write_text("Un deux trois\nquatre Cinq\nsix\n" * 5)
    files = ["--source", str(tmp_path / "en"), "--target", str(tmp_path / "fr"), "--output", str(tmp_path / "run")]
    options = ["--preset", "tiny", "--vocab-size", "300", "--threads", "1", "--steps", "3", "--log-every", "1"]
    assert cli_train.main([*files, *options]) == 0
    test = ["--source", str(tmp_path / "en"), "--reference", str(tmp_path / "fr"), "--threads", "1", "--language", "fr"]
    output = tmp_path / "quality.json"
    assert quality.main([f"ours={tmp_path / 'run'}", *test, "--beam-size", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    row = result["rows"]["ours"]
    assert row["steps"] == 3 and row["tokens_per_second"] > 0 and row["settings"]["vocab_size"] == 300
    assert 0 <= row["bleu"] <= 100 and "case:mixed" in row["signatures"]["bleu"]
    assert 0 <= row["bleu_lower_cased"] <= 100 and "case:lc" in row["signatures"]["bleu_lower_cased"]
    assert 0 <= row["bleu_tokenised"] <= 100 and "tok:none" in row["signatures"]["bleu_tokenised"]
    assert report_training.of_quality(result) in capsys.readouterr().out


def test_case_alone_makes_no_difference_in_lower_case():
    words = ["un deux trois quatre cinq six"]
    assert quality.lower_cased([words[0].upper()], words)[0] == pytest.approx(100.0)
    assert quality.bleu([words[0].upper()], words).score < 1.0


def test_a_model_of_prepared_text(tmp_path, monkeypatch, capsys):
    """It is given tokens, and what it writes is joined for sacreBLEU, whose case is lost."""
    (tmp_path / "test.en").write_text("A dog runs.\n")
    (tmp_path / "test.fr").write_text("Un chien court sur l'herbe.\n")
    given = []

    class Best(NamedTuple):
        text: str

    class Model:
        def translate(self, source, beam_size):
            given.extend(source)
            return [[Best("un chien court sur l' herbe .")]]

    monkeypatch.setattr(quality, "find_checkpoint", lambda folder: folder)
    monkeypatch.setattr(quality, "load_checkpoint", lambda path: (torch.nn.Linear(1, 1), None, {}, None))
    monkeypatch.setattr(quality.Translator, "load", lambda path: Model())
    monkeypatch.setattr(quality, "logged", lambda folder: {"steps": 1, "tokens_per_second": 2, "minutes": 3})
    files = ["--source", str(tmp_path / "test.en"), "--reference", str(tmp_path / "test.fr")]
    output = tmp_path / "quality.json"
    assert quality.main([f"ours={tmp_path}", *files, "--prepared", "--threads", "1", "--output", str(output)]) == 0
    row = json.loads(output.read_text())["rows"]["ours"]
    assert given == ["a dog runs ."] and "bleu" not in row
    assert row["bleu_lower_cased"] == row["bleu_tokenised"] == 100.0
    assert "| 100.00 | 100.00 |" in capsys.readouterr().out


def test_moses_takes_an_article_off_its_noun():
    """The tokens of Multi30k's papers: l'herbe is two words there and one to sacreBLEU's own rules."""
    tokens = moses.tokens(["Un chien court sur l’herbe, vite."], "fr")
    assert tokens == ["un chien court sur l' herbe , vite ."]
    assert moses.joined(tokens, "fr") == ["un chien court sur l'herbe, vite."]


def test_tokens_are_judged_word_by_word():
    reference = moses.tokens(["Le chien court sur l'herbe verte."], "fr")
    assert quality.tokenised(["le chien court sur l' herbe verte ."], reference)[0] == pytest.approx(100.0)
    # 8 words, the fourth another: 7/8, 5/7, 3/6 and 1/5 of the n-grams are right
    wrong = quality.tokenised(["le chien court dans l' herbe verte ."], reference)[0]
    assert wrong == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25)


def test_prepared_files(tmp_path, capsys):
    (tmp_path / "a.fr").write_text("L'homme.\n\nIl dit « Oui »\n", encoding="utf-8")
    (tmp_path / "a.en").write_text("The man's hat\n", encoding="utf-8")
    files = [str(tmp_path / "a.fr"), str(tmp_path / "a.en")]
    assert moses.main([*files, "--output", str(tmp_path / "new")]) == 0
    lines = (tmp_path / "new" / "a.fr").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["l' homme .", ""] and len(lines) == 3
    assert (tmp_path / "new" / "a.en").read_text() == "the man 's hat\n"
    (tmp_path / "text").write_text("x")
    for arguments, message in (
        ([str(tmp_path / "text"), "--output", str(tmp_path / "new")], "ends in no language: give --language"),
        ([str(tmp_path / "no.fr"), "--output", str(tmp_path / "new")], "No such file"),
        ([files[0], "--output", str(tmp_path)], "would be written over itself"),
        ([files[0], files[0], "--output", str(tmp_path / "new")], "the same name"),
    ):
        with pytest.raises(SystemExit):
            moses.main(arguments)
        assert message in capsys.readouterr().err
    assert (tmp_path / "a.fr").read_text(encoding="utf-8").startswith("L'homme")


def test_a_reference_without_a_language(capsys):
    with pytest.raises(SystemExit):
        quality.main(["ours=run", "--source", "test.en", "--reference", "test"])
    assert "give --language" in capsys.readouterr().err


@pytest.mark.parametrize("lines", ["", '{"kind": "validation", "step": 1}\n'])
def test_a_log_without_steps(tmp_path, lines):
    (tmp_path / "log.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="holds no step"):
        quality.logged(tmp_path)


def test_readme_shows_the_committed_result():
    files = newest(ROOT / "bench" / "results" / "quality")
    if not files:
        pytest.skip("no result is committed")
    assert report_training.of_quality(json.loads(files[-1].read_text())) in (ROOT / "README.md").read_text()
