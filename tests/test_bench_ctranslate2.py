"""The comparison with CTranslate2: that it runs, and that it would notice an engine that translates otherwise."""

from __future__ import annotations

import json

import pytest
import torch

from bench import ctranslate2 as comparison
from bench import report_decoding
from bench.engines import MODEL_FILE, Fused
from bench.report import ROOT, newest
from fused_transformer.checkpoint import load_model

pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    comparison.write_models(comparison.TINY, folder)
    return folder


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_work(batch=3, beam_size=1):
    return comparison.make_work(batch, beam_size, 1, 8, comparison.TINY.target_vocab_size)


@pytest.mark.slow
def test_a_quick_run(tmp_path, capfd):
    output = tmp_path / "result.json"
    options = ["--quick", "--threads", "1", "--batches", "1", "3", "--rounds", "2", "--output", str(output)]
    assert comparison.main(options) == 0
    result = json.loads(output.read_text())
    assert [row["name"] for row in result["rows"]] == [
        f"batch {batch} {how}, 1 thread" for batch in (1, 3) for how in ("greedy", "beam 4")
    ]
    for row in result["rows"]:
        for name, figures in row["engines"].items():
            assert figures["tokens_per_second"] > 0 and figures["rounds"] == 2
            if name.endswith("float32"):
                assert figures["same"] + figures["ties"] == figures["sentences"]
    for figures in result["processes"].values():
        assert 0 < figures["before_megabytes"] <= figures["peak_megabytes"] and figures["load_seconds"] > 0
    assert set(result["rows"][0]["engines"]) | set(result["absent"]) == {
        " ".join(contestant) for contestant in (*comparison.CONTESTANTS, comparison.ONE_BY_ONE)
    }
    assert "batch 3 beam 4, 1 thread" in capfd.readouterr().out


def test_without_ctranslate2_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    assert comparison.main(["--quick"]) == 0
    assert "skipped: ctranslate2 is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("beam_size", [1, 4])
def test_other_tokens_are_noticed(folder, beam_size):
    work = make_work(beam_size=beam_size)
    found = work.run(Fused(folder, "float32", 1))
    judge = load_model(folder / MODEL_FILE, dtype=torch.float64)
    good = comparison.agreement(work, found, found, judge)
    assert (good["sentences"], good["same"], good["others"]) == (3 * len(work.batches), 3 * len(work.batches), 0)
    wrong = [row.copy() for row in found]
    wrong[1][5] = 17 if wrong[1][5] != 17 else 18
    with pytest.raises(AssertionError, match="other translations"):
        comparison.agreement(work, found, wrong, judge)
    assert comparison.agreement(work, found, wrong, None)["others"] == 1
    with pytest.raises(AssertionError, match="8 and 7 tokens"):
        comparison.agreement(work, found, [row[:7] for row in found], judge)


def test_a_tie_is_no_difference(folder):
    """Two tokens with the same row in the table: float64 can't tell them apart as the next token."""
    judge = load_model(folder / MODEL_FILE, dtype=torch.float64)
    with torch.no_grad():
        judge.source_embedding.weight[20] = judge.source_embedding.weight[21]
    assert comparison.is_tie(judge, [5, 6, 7], [9, 20, 11], [9, 21, 12], greedy=True)
    assert not comparison.is_tie(judge, [5, 6, 7], [9, 20, 11], [9, 22, 11], greedy=True)
    assert comparison.is_tie(judge, [5, 6, 7], [9, 20, 11], [9, 21, 11], greedy=False)
    assert not comparison.is_tie(judge, [5, 6, 7], [9, 20, 11], [9, 21, 12], greedy=False)


def test_the_least_time_is_reading_or_multiplying():
    rate = {"read_bytes": 1e9, "operations": 1e12}
    one, many = (make_work(batch) for batch in (1, 64))
    reads = comparison.least_seconds(comparison.BASE, one, "float32", {**rate, "operations": 1e30})
    halved = comparison.least_seconds(comparison.BASE, one, "bfloat16", {**rate, "operations": 1e30})
    assert reads == pytest.approx(2 * halved)
    assert comparison.least_seconds(comparison.BASE, one, "float32", rate) >= reads
    # Weights of a step: 6 layers of 6 E² + 2 E F, and the table; of the encoder 4 E² + 2 E F, and keys and values.
    e, f, v = 512, 2048, 32_000
    step, before = 6 * (6 * e * e + 2 * e * f) + v * e, 6 * (4 * e * e + 2 * e * f) + 6 * 2 * e * e
    assert reads == pytest.approx(4 * len(one.batches) * (before + one.length * step) / 1e9)
    multiplies = comparison.least_seconds(comparison.BASE, many, "float32", {**rate, "read_bytes": 1e30})
    rows = sum(len(source) + 1 for source in many.batches[0])
    assert multiplies == pytest.approx(2 * (before * rows + step * 64 * many.length) / 1e12)


def test_the_table_of_readme_is_of_the_committed_result():
    files = newest(ROOT / "bench" / "results" / "ctranslate2")
    if not files:
        pytest.skip("no result is committed")
    readme = (ROOT / "README.md").read_text()
    for file in files:
        result = json.loads(file.read_text())
        text = report_decoding.of_ctranslate2(result)
        assert text in readme
        engines = result["rows"][0]["engines"]
        assert set(engines) <= set(report_decoding.COLUMNS.values())
        for figures in engines.values():
            assert f"{figures['tokens_per_second']:,.0f}" in text
