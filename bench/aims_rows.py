"""What bench/aims.py looks at: a result's rows, and as such rows what else was measured on the same machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench import compare

BYTES_OF_A_ROW = 3 * 512 * 4  # of add layer norm's curve: x, residual and y of width 512 in float32
BEYOND_CACHES = 100e6  # bytes: three times the level 3 cache of the Zen 3 whose results are here


def rows_of(path: Path) -> list[dict]:
    """Of the suite, and what bench.training and bench.ctranslate2 last wrote for the same processor.

    Raises:
        ValueError: it is another file.
    """
    results = compare.read(path)
    if not all("group" in row for row in results["rows"]):
        raise ValueError(f"{path} is no result of the suite: what other benchmarks wrote is looked for beside it")
    rows = [*results["rows"], *_out_of_cache(results)]
    for folder, made in (("training", _trained), ("ctranslate2", _decoded)):
        beside = _beside(path, folder)
        for row in compare.read(beside)["rows"] if beside.exists() else ():
            rows += made(row)
    return rows


def _beside(path: Path, folder: str) -> Path:
    """The newest of the folder's results for the same processor (names end with the day), or what has path's name."""
    processor = path.stem.rpartition("_")[0]
    files = sorted((path.parent / folder).glob(f"{processor}_????-??-??.json")) if processor else []
    return files[-1] if files else path.parent / folder / path.name


def _out_of_cache(results: dict) -> Iterator[dict]:
    """Residual and norm of so many rows that they are far more than a cache holds."""
    for curve in results.get("curves", []):
        if (curve["name"], curve["along"], curve["unit"]) == ("add layer norm", "rows", "µs"):
            for size, median in zip(curve["sizes"], curve["values"][curve["ours"]], strict=True):
                moved = size * BYTES_OF_A_ROW
                share = moved / median / 1e3 / results["rooflines"]["copy_gb_per_s"]
                if moved > BEYOND_CACHES:
                    row = _row("add layer norm by rows", f"M{size}", curve["ours"], {curve["ours"]: median})
                    yield row | {"bytes": moved, "share_of_copy": share}


def _trained(row: dict) -> Iterator[dict]:
    times = {label: took["median_us"] for label, took in row["times"].items()}
    if "torch.nn compiled" in times:
        times["compile"] = times.pop("torch.nn compiled")
    yield _row("training mix", row["name"], "fused", times)


def _decoded(row: dict) -> Iterator[dict]:
    """One for each engine, beside all the others."""
    times = {label: 1e6 / engine["tokens_per_second"] for label, engine in row["engines"].items()}
    return (_row(label, row["name"], label, times) for label in times)


def _row(group: str, name: str, ours: str, times: dict[str, float]) -> dict:
    made = {label: {"median_us": median} for label, median in times.items()}
    return {"group": group, "name": name, "ours": ours, "dtype": "float32", "times": made}
