"""bench.step: that a step's parts are those of the model it says, and that README shows what is committed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import report_decoding, step
from bench.report import ROOT, newest
from fused_transformer import PackedTransformer, Transformer, TransformerConfig

TINY = TransformerConfig(source_vocab_size=50, d_model=16, num_heads=2, d_feedforward=32, num_encoder_layers=1)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_holds_every_part(monkeypatch):
    monkeypatch.setattr(step, "ROUNDS", 2)
    model = PackedTransformer(Transformer(TINY).eval())
    row = step.measure(model, 3, 2, 1, {"read_bytes": 1e9, "operations": 1e9})
    parts = [row[name] for name in ("layers", "vocabulary", "search")]
    assert all(x > 0 for x in parts) and row["whole"] == pytest.approx(sum(parts), abs=0.2)
    inside = [row[name] for name in ("products", "attention", "norms", "rest")]
    assert min(inside) >= 0 and sum(inside) == pytest.approx(row["layers"], abs=0.4)
    e, f, v = 16, 32, 50
    assert row["limit"] == pytest.approx(1e6 * 2 * (6 * (6 * e * e + 2 * e * f) + v * e) * 6 / 1e9, rel=1e-2)
    head = {"machine": {"processor": "P"}, "date": "D", "position": 16, "source": 32}
    text = report_decoding.of_step({**head, "rows": [row]})
    assert "float32, batch 3, 2 beams, 1 thread" in text and "calls of their own" not in text
    text = report_decoding.of_step({**head, "rows": [row | {"rest": -1.0}]})  # as results of before 2026-11-30 have it
    assert "calls of their own" in text


def test_steps_are_of_one_position():
    model = PackedTransformer(Transformer(TINY).eval())
    with torch.no_grad():
        work = step.Step(model, 2, 2)
        first = work.layers()
        for part in work.parts().values():
            part()
        assert torch.equal(work.layers(), first) and work.state.length == step.POSITION


def test_readme_shows_the_committed_result():
    files = newest(ROOT / "bench" / "results" / "step")
    if not files:
        pytest.skip("no result is committed")
    assert report_decoding.of_step(json.loads(files[-1].read_text())) in (ROOT / "README.md").read_text()
