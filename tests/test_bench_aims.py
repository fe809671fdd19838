"""bench.aims: what is below an aim is named, no row of a group is left out, and bench/README.md says what files do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import aims, aims_rows

BENCH = Path(__file__).parents[1] / "bench"
README = (BENCH / "README.md").read_text()
FORWARD = aims.AIMS[0]


def attention(name: str, share: float, group: str = "attention with lengths", **more) -> dict:
    row = {"group": group, "name": name, "ours": "fused", "dtype": "float32", "times": times()}
    return row | {"share_of_matmul": share} | more


def times(**others: float) -> dict:
    return {label: {"median_us": median} for label, median in {"fused": 100.0, **others}.items()}


def test_a_cell_names_what_is_below_and_tells_the_ends_of_the_rest():
    rows = [attention(f"transformer-base B8 H8 L{length} D64", share)
            for length, share in ((64, 0.335), (128, 0.599), (256, 0.6), (512, 0.683))]  # fmt: skip
    assert FORWARD.cell(rows) == "**L64 34 %, L128 60 %**; else 60 % to 68 %"
    assert FORWARD.cell(rows[:1]) == "**L64 34 %**" and FORWARD.cell(rows[3:]) == "68 %"
    assert FORWARD.cell([]) == "not in the file"
    assert FORWARD.cell([attention("t5-base B8 H12 L256 D64", 0.1, "attention bias")]) == "**bias t5-base L256 10 %**"
    backward = attention("transformer-base B8 H8 L64 D64", 0.1, "attention causal forward backward")
    step = attention("transformer-base B64 H8 L1 S128 D64", 0.1)
    assert FORWARD.cell([backward, step]) == "not in the file"


def test_the_quickest_of_an_aims_alternatives_counts():
    aim = aims.Aim("", 2, "sdpa", "attention causal", " L512 ")
    both = times(**{"sdpa flash": 150.0, "sdpa math": 900.0, "naive": 9.0})
    row = attention("x L512 D64", 0.5, "attention causal", times=both)
    assert aim.cell([row]) == "**causal x L512 1.50**"
    assert aim.cell([attention("x L512 D64", 0.5, "attention causal")]) == "not in the file"  # --peers left them out


@pytest.mark.parametrize("path", aims.newest(), ids=lambda path: path.stem)
def test_no_row_of_a_group_is_left_out(path):
    rows = aims_rows.rows_of(path)
    seen = {(row["group"], row["name"]) for row in rows for aim in aims.AIMS for _ in aim.figures([row])}
    groups = r"attention |(add )?layer norm|embedding|small calls|training (step|mix)|fused "
    left_out = {(row["group"], row["name"]) for row in rows if re.match(groups, row["group"])} - seen
    assert len(seen) > 60
    for group, name in left_out:  # int8 has an aim at batch 1, a training step where it is Transformer-base's
        assert (group, name.startswith("batch 1 ")) == ("fused int8", False) or "transformer-small" in name


def test_what_lies_beside_a_result_and_its_curve_are_rows_of_it(tmp_path):
    curve = {"name": "add layer norm", "along": "rows", "unit": "µs", "ours": "fused"}
    curve |= {"sizes": [64, 65536], "values": {"fused": [1.0, 65536 * 6144 / 50e3], "naive": [2.0, 3.0]}}
    suite = {"machine": {}, "rows": [], "rooflines": {"copy_gb_per_s": 100.0}, "curves": [curve]}
    trained = {"name": "wmt", "times": times(**{"torch.nn": 250.0, "torch.nn compiled": 120.0})}
    engines = {"fused float32": 30.0, "ctranslate2 float32": 10.0, "ctranslate2 int8": 60.0, "fused bfloat16": 45.0}
    engines = {label: {"tokens_per_second": rate} for label, rate in engines.items()}
    decoded = {"name": "batch 1 greedy, 2 threads", "engines": engines}
    for folder, rows in (("training", [trained]), ("ctranslate2", [decoded])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    (tmp_path / "x.json").write_text(json.dumps(suite))
    cells = dict(line.strip("| ").split(" | ") for line in aims.table([tmp_path / "x.json"])[2:])
    assert cells["add + norm of more than 100 MB: 85 %"] == "**M65536 (402.7 MB) 50 %**"
    assert cells["training step of Transformer-base: 1.8 times torch.nn"] == "2.50"
    assert cells["1.3 times torch.compile of it"] == "**wmt 1.20**"
    assert cells["float32 over CTranslate2's, batch 1 greedy: 2.2"] == "3.00"
    assert cells["bfloat16 no slower than CTranslate2's int8"] == "**1 greedy, 2 threads 0.75**"


def test_the_newest_of_the_same_processor_counts(tmp_path):
    (tmp_path / "a-b_2026-01-02.json").write_text(json.dumps({"machine": {}, "rows": [], "curves": []}))
    (tmp_path / "ctranslate2").mkdir()
    for name, rate in (("a-b_2026-01-01", 20.0), ("a-b_2026-01-03", 40.0), ("a-b-c_2026-01-04", 90.0)):
        engines = {"fused float32": {"tokens_per_second": rate}, "ctranslate2 float32": {"tokens_per_second": 10.0}}
        row = {"name": "batch 1 greedy, 2 threads", "engines": engines}
        (tmp_path / "ctranslate2" / f"{name}.json").write_text(json.dumps({"machine": {}, "rows": [row]}))
    cells = dict(line.strip("| ").split(" | ") for line in aims.table([tmp_path / "a-b_2026-01-02.json"])[2:])
    assert cells["float32 over CTranslate2's, batch 1 greedy: 2.2"] == "4.00"


def test_the_readme_has_what_the_newest_results_have():
    told = README.partition("<!-- aims:begin -->\n")[2].partition("\n<!-- aims:end -->")[0]
    assert told.splitlines() == aims.table(aims.newest()), "python -m bench.aims makes the table anew"


def test_bleu_in_the_readme_is_what_the_newest_result_has():
    path = sorted((BENCH / "results" / "quality").glob("*.json"))[-1]
    ours, twin, further = (json.loads(path.read_text())["rows"][name] for name in ("ours", "torch.nn", "ours, further"))
    assert f"| {further['bleu_tokenised']:.2f} after {further['steps']:,} steps |" in README
    both = f"{twin['bleu_tokenised']:.2f} and ours {ours['bleu_tokenised']:.2f}, after {ours['steps']:,} steps each"
    assert f"| {both} |" in README and twin["steps"] == ours["steps"]


def test_rates_of_large_products_in_the_readme_are_those_of_the_files():
    for path in aims.newest():
        suite = json.loads(path.read_text())["rooflines"]["matmul_gflop_per_s"]
        newest = max((path.parent / "training").glob(f"{path.stem.rpartition('_')[0]}_*.json"))
        training = json.loads(newest.read_text())["rooflines"]["matmul_gflop_per_s"]
        for rate in (suite["float32"], suite["bfloat16"], training):
            assert f"{rate:,.0f}" in README, f"{path.stem}: {rate}"


def test_the_pictures_that_the_readme_links_are_there():
    links = re.findall(r"\]\((results/[^)]+)\)", README)
    for kind in ("roofline", "scaling", "memory"):
        assert any(link.endswith(f"_{kind}.svg") for link in links), kind
    assert all((BENCH / link).exists() for link in links)
    assert all(any(path.stem in link for link in links) for path in aims.newest())


def test_a_file_that_is_no_result_is_refused_in_a_sentence(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert aims.main([str(tmp_path / "x.json")]) == 2
    assert f"python -m bench.aims: error: {tmp_path / 'x.json'} is no result" in capsys.readouterr().err


def test_what_another_benchmark_wrote_is_refused(capsys):
    path = next((BENCH / "results" / "training").glob("*.json"))
    assert aims.main([str(path)]) == 2
    assert f"{path} is no result of the suite" in capsys.readouterr().err
