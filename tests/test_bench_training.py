"""bench.training: that both models do the same work, what its parts are, and that README shows what is committed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import report_training, shapes, training
from bench.report import ROOT, newest

TINY = shapes.Model("tiny", 4, 9, 16, 2, 32, 1, 60)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", training.MIXES)
def test_a_batch_is_of_whole_sentences(name):
    mix = training.MIXES[name]
    batch = training.make_batch(mix, 100)
    assert batch.source.shape == (mix.batch, mix.longest) and batch.target.shape == (mix.batch, mix.longest + 1)
    assert (batch.source != training.PAD).sum(1).equal(batch.source_lengths)
    assert (batch.target[:, :-1] != training.PAD).sum(1).ge(batch.target_lengths).all()
    assert (batch.target[:, 1:] != training.PAD).sum(1).equal(batch.target_lengths)


def test_another_loss_is_noticed(monkeypatch):
    batch = training.make_batch(training.QUICK["wmt"], 60)
    longer = shapes.Model("tiny", 4, 20, 16, 2, 32, 1, 60)
    models = training.build(longer, "cpu")
    training.assert_same_loss(models, batch)
    monkeypatch.setattr(training, "SMOOTHING", 0.2)
    training.assert_same_loss(models, batch)
    with torch.no_grad():
        models["fused"].encoder.layers[0].norm1.weight[0] = 2.0
    with pytest.raises(AssertionError):
        training.assert_same_loss(models, batch)


def test_a_row_and_its_table():
    row = training.measure("multi30k", training.QUICK["multi30k"], TINY, 1, compile=False, rounds=2)
    assert set(row["times"]) == {"fused", "torch.nn"} and all(x["median_us"] > 0 for x in row["times"].values())
    assert set(row["parts"]) == set(report_training.PARTS)
    assert all(row["parts"][part] > 0 for part in ("products", "attention", "norms", "embedding", "loss", "optimizer"))
    assert all(x > 0 for x in row["limits"].values())
    head = {"machine": {"processor": "P", "torch": "T"}, "date": "D"}
    rates = {"matmul_gflop_per_s": 1.0, "copy_gb_per_s": 1.0}
    text = report_training.of_training({**head, "rooflines": rates, "rows": [row]})
    assert "| tiny B4 L9 E16 N1 V60 |" in text and text.count("tiny") == 2


def test_the_least_number_of_operations():
    """One token on each side: every weight once forward and twice backward, and one pair for each attention."""
    batch = training.Batch(*(torch.tensor(x) for x in ([[5]], [1], [[1, 6]], [1])))
    found = training.limits(TINY, batch, 10)
    e, f, v = 16, 32, 60
    rate = training.matmul_gigaflops_per_second(torch.float32) * 1e3
    assert found["products"] * rate == pytest.approx(6 * (4 * e * e + 2 * e * f + 8 * e * e + 2 * e * f + e * v))
    assert found["attention"] * rate == pytest.approx(14 * e * 3)


def test_readme_shows_the_committed_result():
    files = newest(ROOT / "bench" / "results" / "training")
    if not files:
        pytest.skip("no result is committed")
    assert report_training.of_training(json.loads(files[-1].read_text())) in (ROOT / "README.md").read_text()
