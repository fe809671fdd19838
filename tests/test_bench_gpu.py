"""What the benchmarks do differently on a GPU, as far as it can be seen without one."""

from __future__ import annotations

import json

import pytest
import torch

from bench import report, shapes
from bench.timing import Stamp


def test_a_gpu_is_given_larger_shapes_and_the_other_dtype(monkeypatch):
    attention = shapes.Attention("any", 2, 8, 64, 64)
    rows = shapes.Rows("any", 10, 512, dtype=torch.bfloat16)
    layer = shapes.Layer("any", 3, 64)
    assert [shapes.here(one) for one in (attention, rows, layer)] == [attention, rows, layer]
    monkeypatch.setattr(Stamp, "device", "cuda")
    assert shapes.here(attention) == shapes.Attention("any", 32, 8, 64, 64, dtype=torch.bfloat16)
    assert shapes.here(rows) == shapes.Rows("any", 160, 512)
    assert shapes.here(layer) == shapes.Layer("any", 48, 64)


def row(**more) -> dict:
    times = {label: {"median_us": time} for label, time in (("fused", 90.0), ("fused triton", 99.0), ("naive", 180.0))}
    return {"group": "any op", "name": "any shape", "ours": "fused", "times": times, "refused": {}, **more}


def results_of(*rows: dict, device: str = "cuda") -> dict:
    machine = {"device": device, "processor": "any", "threads": 2, "isa": "avx2", "torch": "2", "commit": None}
    if device == "cuda":
        machine["gpu"] = "Any GPU"
    rooflines = {"copy_gb_per_s": 1.0, "matmul_gflop_per_s": {}}
    return report.results_of(machine, rooflines, list(rows), [], [])


def test_device_and_host_stand_apart():
    graph = {"fused": 40.0, "fused triton": 30.0, "naive": 120.0, "sdpa": 50.0}
    measured = row(graph_us=graph, host_us={"fused": 12.0, "naive": 1500.0})
    assert report.apart(measured) == "device 40.0 µs, triton 30.0 µs (sdpa 50.0 µs); host 12.0 µs (naive 1.50 ms)"
    assert report.apart(row()) == ""
    assert report.apart(row(graph_us={"naive": 1.0}, host_us={"fused": 12.0})) == "host 12.0 µs"
    table = report.markdown(results_of(row(), measured), "figure.svg").splitlines()
    widths = {line.count("|") for line in table if line.startswith("|")}
    assert len(widths) == 1, "a row has more or fewer cells than the head of its table"
    assert "apart" not in report.markdown(results_of(row()), "figure.svg")


def test_a_gpus_results_have_a_heading_of_their_own(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n\n## On a GPU\n\n{report.GPU_BEGIN}\n{report.GPU_END}\n")
    files = [report.write_results(tmp_path, results_of(row(), device=device)) for device in ("cpu", "cuda")]
    report.main([*map(str, files), "--readme", str(readme)])
    processors, gpus = readme.read_text().split("## On a GPU")
    assert "Any GPU" in gpus and "Any GPU" not in processors
    assert "2 threads" in processors and "2 threads" not in gpus


@pytest.mark.parametrize("complete", [True, False])
def test_readme_is_not_made_of_results_with_rows_missing(complete, tmp_path):
    written = report.write_results(tmp_path, results_of(row()), complete=complete)
    assert json.loads(written.read_text())["rows"][0]["name"] == "any shape"
    assert report.newest(tmp_path) == ([written] if complete else [])
