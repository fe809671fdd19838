"""--compare: slower is what got slower beyond the noise that both results measured, and beyond what the machine did."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench import compare

MACHINE = {"device": "cpu", "processor": "P", "threads": 2, "isa": "avx2", "python": "3", "torch": "2"}


def times(median: float, spread: float = 0.02) -> dict:
    return {"median_us": median, "p20_us": median * (1 - spread), "p80_us": median * (1 + spread), "rounds": 50}


def result(**rows: dict[str, dict]) -> dict:
    return {
        "machine": dict(MACHINE),
        "rows": [{"group": "attention", "name": name, "ours": "fused", "times": row} for name, row in rows.items()],
    }


def verdicts(old: dict, new: dict) -> dict[str, str]:
    return {change.name: change.verdict for change in compare.changes(old, new)}


def one(ours: float, torchs: float | None = 200.0, spread: float = 0.02, **others: float) -> dict:
    labels = {"fused": ours, "naive": torchs, **others}
    return result(row={label: times(t, spread) for label, t in labels.items() if t is not None})


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (one(100), one(120), "slower"),
        (one(120), one(100), "faster"),
        (one(100), one(104), "same"),  # less than percentiles of a few rounds are worth
        (one(100, spread=0.15), one(120, spread=0.15), "same"),  # noise: the intervals overlap
        (one(100, spread=0.15), one(170, spread=0.15), "slower"),  # noise, and more than that
        (one(100, 200), one(130, 260), "same"),  # torch takes 30 % longer as well: the machine
        (one(100, 200), one(170, 260), "slower"),  # the machine, and more than that
        (one(100, 200), one(100, 140), "slower"),  # a quicker machine hides nothing
        (one(130, 260), one(100, 200), "same"),
        (one(100, 200, sdpa=150), one(130, 200, sdpa=195), "same"),  # they disagree: the one that excuses most
        (one(130, 200, sdpa=195), one(100, 200, sdpa=150), "same"),
        (one(100, 200, sdpa=150), one(130, 200, sdpa=150), "slower"),
    ],
)
def test_the_rule(old, new, verdict):
    assert verdicts(old, new) == {"row": verdict}


def test_a_noisier_machine_excuses_as_much_as_its_noise():
    """torch's median is what it was and its 80th percentile half as much again: so may ours be, and no more."""
    old, new = one(100), one(140)
    new["rows"][0]["times"]["naive"]["p80_us"] *= 1.5
    assert verdicts(old, new) == {"row": "same"}
    worse = one(180)
    worse["rows"][0]["times"]["naive"]["p80_us"] *= 1.5
    assert verdicts(old, worse) == {"row": "slower"}


def test_ours_on_another_backend_is_no_control():
    old = result(row={"fused": times(100), "fused triton": times(100), "naive": times(200)})
    new = result(row={"fused": times(150), "fused triton": times(150), "naive": times(200)})
    assert verdicts(old, new) == {"row": "slower"}


def test_a_row_without_alternatives_moves_as_the_median_row():
    old = result(a={"fused": times(100), "naive": times(100)}, b={"fused": times(100)}, c={"fused": times(100)})
    new = result(a={"fused": times(140), "naive": times(140)}, b={"fused": times(140)}, c={"fused": times(210)})
    assert verdicts(old, new) == {"a": "same", "b": "same", "c": "slower"}


def test_rows_that_came_and_went_are_told_and_no_regression(tmp_path, capsys):
    old = result(a={"fused": times(100)}, b={"fused": times(100)})
    new = result(b={"fused": times(100)}, c={"fused": times(100)})
    assert compare.missing(old, new) == (["attention a"], ["attention c"])
    assert run(tmp_path, old, new) == 0
    out = capsys.readouterr().out
    assert "1 gone: attention a" in out and "1 new: attention c" in out and "WARNING" not in out


def run(folder, old: dict, new: dict) -> int:
    paths = folder / "old.json", folder / "new.json"
    for path, results in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(results))
    return compare.main(*paths)


def test_the_exit_status_and_what_is_printed(tmp_path, capsys):
    assert run(tmp_path, one(100), one(150)) == 1
    out = capsys.readouterr().out
    assert "1 slower:\n  attention, row: 100.0 -> 150.0 µs, 1.50× (the machine itself 1.00×)" in out
    assert "20th percentile" in out  # the rule is told
    assert run(tmp_path, one(150), one(100)) == 0
    assert "1 faster:" in capsys.readouterr().out
    assert run(tmp_path, one(100), one(100)) == 0
    assert "1 the same within the noise" in capsys.readouterr().out


def test_another_machine_is_warned_of_and_another_torch_is_noted(tmp_path, capsys):
    new = one(100)
    new["machine"] |= {"processor": "Q", "threads": 8}
    run(tmp_path, one(100), new)
    out = capsys.readouterr().out
    assert out.startswith("WARNING: not the same machine (processor P -> Q; threads 2 -> 8)") and "note:" not in out
    new = copy.deepcopy(one(100))
    new["machine"]["torch"] = "3"
    run(tmp_path, one(100), new)
    out = capsys.readouterr().out
    assert "note: torch 2 -> 3" in out and "WARNING" not in out


def test_a_file_that_is_no_result(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("no json")
    assert compare.main(tmp_path / "x.json", tmp_path / "x.json") == 2
    assert "is no result of python -m bench" in capsys.readouterr().err
    assert compare.main(tmp_path / "y.json", tmp_path / "y.json") == 2
    assert compare.main(tmp_path / "none.json", tmp_path / "y.json") == 2
    assert "none.json can't be read" in capsys.readouterr().err


# ---------------------------------------------------------------- curves and memory


def grown(unit: str = "µs", **values: list) -> dict:
    curve = {"name": "attention causal", "along": "length", "fixed": "B1", "unit": unit, "ours": "fused"}
    return {**one(100), "curves": [{**curve, "sizes": [64, 128, 256], "values": values}]}


def held(**peaks: int) -> dict:
    entry = {"name": "attention", "what": "forward", "shape": "L512", "ours": "fused"}
    return {**one(100), "memory": [{**entry, "peak_bytes": peaks}]}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([100, 200, 400], [1000, 2000, 4000], "slower slower slower"),
        ([100, 200, 400], [100, 200, 4000], "same same slower"),  # a power of the size that has grown
        ([100, 200, 400], [120, 240, 480], "same same same"),  # medians of few rounds
        ([1000, 200, 400], [100, 200, 400], "faster same same"),
    ],
)
def test_points_of_curves(old, new, expected, tmp_path):
    before, after = grown(fused=old, naive=[300, 600, 900]), grown(fused=new, naive=[300, 600, 900])
    assert [change.verdict for change in compare.points(before, after)] == expected.split()
    assert run(tmp_path, before, after) == int("slower" in expected)


def test_a_point_is_excused_by_alternatives_at_its_size_and_those_beside_it():
    old = grown(fused=[100, 100, 100], naive=[100, 100, 100])
    new = grown(fused=[190, 190, 190], naive=[100, 100, 190])  # something ran beside the largest size
    assert [change.verdict for change in compare.points(old, new)] == ["slower", "same", "same"]
    worse = grown(fused=[190, 190, 380], naive=[100, 100, 190])  # and more than that
    assert compare.points(old, worse)[-1].verdict == "slower"


def test_points_without_alternatives_move_as_the_median_point_and_missing_ones_are_told():
    old = grown(fused=[100, 100, 100], naive=[100, None, None])
    new = grown(fused=[140, 140, 140], naive=[140, None, None])
    assert [change.verdict for change in compare.points(old, new)] == ["same"] * 3
    new["curves"][0]["values"]["fused"] = [140, 140, None]
    assert len(compare.points(old, new)) == 2
    assert compare.missing(old, new) == (["attention causal, by length (B1) at 256"], [])


def test_memory_is_counted_and_no_machine_excuses_it(tmp_path, capsys):
    old, new = held(fused=1000, naive=5000), held(fused=10_000, naive=50_000)
    assert run(tmp_path, old, new) == 1
    assert "1 more memory:\n  attention, forward, L512: 1,000 -> 10,000 bytes, 10.00×" in capsys.readouterr().out
    assert run(tmp_path, new, old) == 0 and "1 less memory:" in capsys.readouterr().out
    assert run(tmp_path, old, held(fused=1020)) == 0 and "1 the same memory" in capsys.readouterr().out
    assert run(tmp_path, held(fused=0), held(fused=8)) == 1 and run(tmp_path, held(fused=8), held(fused=0)) == 0
    ways = {"fused": 1000, "fused in chunks": 500}
    assert run(tmp_path, held(**ways), held(**ways | {"fused in chunks": 900})) == 1
    assert "L512, ours in chunks: 500 -> 900" in capsys.readouterr().out


def test_memory_along_a_curve_and_of_a_row():
    old, new = grown("bytes", fused=[10, 20, 40]), grown("bytes", fused=[10, 20, 80])
    assert [change.verdict for change in compare.memory(old, new)] == ["same", "same", "more"]
    assert compare.points(old, new) == []
    old, new = one(100), one(100)
    old["rows"][0]["peak_bytes"], new["rows"][0]["peak_bytes"] = {"fused": 10, "naive": 50}, {"fused": 50, "naive": 50}
    assert [change.verdict for change in compare.memory(old, new)] == ["more"]


def test_a_committed_result_beside_itself_with_all_of_ours_times_ten(tmp_path, capsys):
    path = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*_????-??-??.json"))[0]
    old = json.loads(path.read_text())
    assert run(tmp_path, old, old) == 0
    for part, what in (("curves", "values"), ("memory", "peak_bytes")):
        new = copy.deepcopy(old)
        for entry in new[part]:
            own = entry[what]["fused"]
            entry[what]["fused"] = [10 * x for x in own] if isinstance(own, list) else 10 * own
        capsys.readouterr()
        assert run(tmp_path, old, new) == 1
        assert "0 more memory" not in capsys.readouterr().out
    assert len(compare.points(old, old)) > 50 and len(compare.memory(old, old)) > 20
