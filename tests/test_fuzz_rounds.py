"""What tests/fuzz.py promises of its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests import fuzz

CALLS = st.fixed_dictionaries({"n": st.integers(0, 2**40)})


def test_a_usual_run_is_the_same_each_time():
    def drawn():
        seen = []
        assert fuzz.run(CALLS, lambda call: seen.append(call["n"]), 30) == 0
        return seen

    assert len(drawn()) == 30 and drawn() == drawn()


def test_rounds_go_on_for_their_time_and_differ(monkeypatch):
    monkeypatch.setenv(fuzz.SECONDS, "1")
    monkeypatch.setenv(fuzz.SEED, "7")
    seen = []
    rounds = fuzz.run(CALLS, lambda call: seen.append(call["n"]), 30)
    assert rounds > 1 and len(seen) == rounds * fuzz.ROUND and len({*seen}) > fuzz.ROUND


def test_a_failure_says_how_to_repeat_it(monkeypatch, capsys):
    monkeypatch.setenv(fuzz.SECONDS, "1000")
    monkeypatch.setenv(fuzz.SEED, "3")

    def check(call):
        assert call["n"] < 1000

    with pytest.raises(AssertionError):
        fuzz.run(CALLS, check, 30)
    told = capsys.readouterr().out
    assert "to repeat it: FUSED_TRANSFORMER_FUZZ_SEED=3 FUSED_TRANSFORMER_FUZZ_SECONDS=0 python -m pytest" in told
    assert "test_a_failure_says_how_to_repeat_it" in told


def test_there_is_a_random_test_of_every_op():
    kernels = Path(__file__).parents[1] / "kernels"
    ops = {path.parent.name for path in kernels.glob("*/reference.py")} - {"decoder_step"}  # it is linear and the rest
    here = Path(__file__).parent / "kernels"
    text = "".join(path.read_text() for path in here.glob("test*fuzz.py"))
    assert {op for op in ops if f"def test_{op}(" not in text} == {
        "attention",
        "decode_attention",
    }  # files of their own
