"""Curves, memory and pictures of a result: powers of power laws are exact, attention is linear, pages are whole."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
import torch

from bench import growth, plots, report, report_growth
from fused_transformer.kernels import attention
from tests.memory import peak_bytes

SIZES = [2**i for i in range(6, 15)]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_the_slope_of_a_power_law_is_its_power(power):
    assert growth.slope(SIZES, [3.7 * size**power for size in SIZES]) == power
    assert growth.slope(SIZES[::-1], [3.7 * size**power for size in SIZES[::-1]]) == power


def test_a_fixed_cost_at_small_sizes_does_not_count():
    values = [max(1e4, size**2) for size in SIZES]  # flat up to 100, then a square: the larger half is all square
    assert growth.slope(SIZES, values) == 2.0
    whole = growth.slope(SIZES[:3], values[:3])  # of 64, 128 and 256 it is the larger two
    assert whole == 2.0 and growth.slope(SIZES[:2], values[:2]) == pytest.approx(0.71, abs=0.01)


def test_points_that_are_missing_are_left_out():
    assert growth.slope(SIZES, [size**2 for size in SIZES[:4]] + [None] * 5) == 2.0
    assert growth.slope(SIZES, [1.0] + [None] * 8) is None and growth.slope([], []) is None


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward+backward"])
def test_attentions_memory_is_linear_in_the_length(grad):
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 32, requires_grad=grad) for _ in range(3))

        def run() -> None:
            out = attention(q, k, v, causal="top_left")
            if grad:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return peak_bytes(run)

    lengths = [512, 1024, 2048, 4096]
    peaks = [peak(length) for length in lengths]
    assert growth.slope(lengths, peaks) < 1.05
    more = [after - before for before, after in pairwise(peaks)]  # without what each thread holds
    assert growth.slope(lengths[1:], more) == pytest.approx(1.0, abs=0.05)


def test_naive_attentions_memory_is_not():
    """So that the test above can fail."""

    def peak(length: int) -> int:
        q = torch.randn(1, 2, length, 32)
        return peak_bytes(lambda: torch.softmax(q @ q.transpose(-1, -2), -1) @ q)

    assert growth.slope([256, 512, 1024], [peak(n) for n in (256, 512, 1024)]) > 1.8


def times(median: float) -> dict:
    return {"median_us": median, "p20_us": median, "p80_us": median, "rounds": 9}


def make_results() -> dict:
    def row(group: str, name: str, **more) -> dict:
        of = {"fused": times(100.0), "naive": times(250.0), "sdpa flash": times(80.0), "fused triton": times(120.0)}
        refused = {"flex": "no <backward> & no http://where.example"}
        return {
            "group": group,
            "name": name,
            "ours": "fused",
            "refused": refused,
            "dtype": "float32",
            "times": of,
            **more,
        }

    bound = {"flops": 10**8, "bytes": 10**6, "gb_per_s": 10.0, "share_of_copy": 0.4}
    rows = [row("attention causal", "gpt2 L1024", **bound), row("training step", "base", tokens_per_s=1000)]
    values = {"fused": [float(size) for size in SIZES], "naive": [float(size**2) for size in SIZES[:5]] + [None] * 4}
    fixed = {"fixed": "B1 H8"}
    curves = [growth.curve("attention causal", "length", SIZES, values, of=of, **fixed) for of in ("time", "bytes")]
    peaks = {"fused": 10**6, "fused in chunks": 5 * 10**5, "naive": 10**7}
    held = [{"name": "attention", "what": "forward", "shape": "L512", "ours": "fused", "peak_bytes": peaks}]
    machine = {
        "device": "cpu",
        "processor": "A <fast> & 'quick' one",
        "threads": 2,
        "isa": "avx2",
        "torch": "2",
        "commit": "c",
    }
    rooflines = {"copy_gb_per_s": 25.0, "matmul_gflop_per_s": {"float32": 300.0}}
    return report.results_of(machine, rooflines, rows, curves, held)


def test_tables_show_powers_memory_and_ours_on_other_backends():
    text = "\n".join(report.text_table(make_results()))
    assert re.search(r"grows with +\^1\.00 +\^2\.00", text) and "attention causal, by length: time (B1 H8)" in text
    assert re.search(r"attention, forward, L512 +1\.00 MB +0\.50× +10\.00×", text)
    assert re.search(r"gpt2 L1024 +100\.0 µs +1\.20× +2\.50× +0\.80× +10\.0 GB/s", text)
    assert "fused triton" not in text.partition("another implementation is quicker")[2]  # ours is no alternative
    table = "\n".join(report_growth.markdown(make_results()["curves"], make_results()["memory"]))
    assert "| time of attention causal, by length | 64 to 16,384 | 1.00 | naive 2.00 |" in table
    assert report_growth.markdown([], []) == []  # results of before there were any


def test_a_result_goes_through_its_file_unchanged(tmp_path):
    results = make_results()
    path = report.write_results(tmp_path / "there", results)
    assert json.loads(path.read_text()) == results
    assert path.name == f"a-fast-quick-one_{results['date']}.json"
    assert len(path.read_text().splitlines()) < 30  # a line a row


def test_pictures_and_page(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    page, *pictures = plots.write(make_results(), tmp_path / "x.json")
    assert {path.name for path in pictures} == {f"x_{name}.svg" for name in plots.PICTURES}
    for path in pictures:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text = page.read_text()
    inside = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert [base64.b64decode(data) for data in inside] == [path.read_bytes() for path in pictures]
    assert not re.search(r"(src|href)=\"(?!data:)|<script|<link|@import|url\(", text)  # whole in itself
    assert "A &lt;fast&gt; &amp;" in text and "<fast>" not in text
    ElementTree.fromstring(text)  # every tag is closed, every sign that must be is escaped


def test_there_may_be_more_alternatives_than_colours(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = make_results()
    for number in range(20):
        results["memory"][0]["peak_bytes"][f"alternative {number}"] = 10**6 + number
        results["rows"][0]["times"][f"alternative {number}"] = times(100.0 + number)
    plots.write(results, tmp_path / "x.json")
    assert "alternative 19" in (tmp_path / "x_memory.svg").read_text()


def test_pictures_of_nothing_are_left_out(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = make_results() | {"curves": [], "memory": []}
    results["rows"] = [row for row in results["rows"] if "flops" not in row]
    written = plots.write(results, tmp_path / "x.json")
    assert [path.name for path in written] == ["x.html", "x_speedups.svg"]
    rowless = plots.write(make_results() | {"rows": []}, tmp_path / "y.json")
    assert [path.name for path in rowless] == ["y.html", "y_scaling.svg", "y_memory.svg", "y_memory_growth.svg"]


def test_without_matplotlib_the_page_has_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    written = plots.write(make_results(), tmp_path / "x.json")
    assert [path.name for path in written] == ["x.html"]
    assert "pip install matplotlib" in written[0].read_text() and "gpt2 L1024" in written[0].read_text()


def test_pictures_of_a_result_that_is_there_already(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = report.write_results(tmp_path, make_results())
    assert plots.main([str(path), str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / f"{path.stem}.html").exists() and str(tmp_path) in capsys.readouterr().out
    assert plots.main([]) == 2
