"""A result as pictures: speed-ups, the roofline, how times grow, memory; as SVG files, and together in one HTML file.

    python -m bench.plots FILE.json [DIR]

The HTML file is whole in itself: the pictures are in it, and it loads nothing.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from bench import plots_growth, report
from bench.drawing import LOST, OTHER, OURS, bare, dot, patch, subplots

MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def write(results: dict, path: Path) -> list[Path]:
    """The pictures of the result at `path`, beside it: what was written. A picture of nothing is left out; without
    matplotlib all are, and the page has the tables alone: nobody runs the suite again for want of it.
    """
    written: list[Path] = []
    pictures: dict[str, str] = {}
    for name, (draw, _) in PICTURES.items() if importlib.util.find_spec("matplotlib") else ():
        figure = draw(results)
        if figure is None:
            continue
        target = path.with_name(f"{path.stem}_{name}.svg")
        figure.savefig(target, metadata={"Date": None}, facecolor="white")
        pictures[name] = target.read_text()
        written.append(target)
    page = path.with_suffix(".html")
    page.write_text(as_html(results, pictures))
    return [page, *written]


def as_html(results: dict, pictures: dict[str, str]) -> str:
    """`pictures`: SVG by name. Text is escaped: names of processors and reasons of refusals are others' words."""
    machine = html.escape(report.machine_line(results["machine"], results["rooflines"]))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/><title>fused_transformer: benchmarks</title>',
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "img{max-width:100%;height:auto}pre{font-size:12px;overflow-x:auto;background:#f6f6f4;padding:1rem}</style>",
        f"</head><body><h1>Benchmarks of {html.escape(results['date'])}</h1><p>{machine}</p>",
    ]
    for name, svg in pictures.items():
        title = PICTURES[name][1]
        data = base64.b64encode(svg.encode()).decode()
        parts.append(f'<h2>{title}</h2><p><img alt="{title}" src="data:image/svg+xml;base64,{data}"/></p>')
    if not pictures:
        parts.append(
            "<p>No pictures: they need matplotlib (pip install matplotlib; python -m bench.plots FILE.json).</p>"
        )
    text = html.escape("\n".join(report.text_table(results)))
    return "\n".join([*parts, f"<h2>All figures</h2><pre>{text}</pre></body></html>\n"])


def speedups(results: dict):
    """Two bars for each group: the fastest alternative's time over ours, and naive torch's (or torch.nn's), medians of
    its rows; a line from the worst row to the best.
    """
    groups = [(group, rows) for group, rows in report.grouped(results["rows"]) if any(map(report.others, rows))]
    if not groups:
        return None
    figure, axes = subplots(figsize=(8.5, 1.2 + 0.34 * len(groups)))
    for place, (_, rows) in enumerate(groups):
        best = [found[1] for row in rows if (found := report.fastest_other(row))]
        naive = [ratio for row in rows for label, ratio in report.others(row).items() if label in ("naive", "torch.nn")]
        middle = statistics.median(best)
        if naive:
            axes.barh(place + 0.2, statistics.median(naive) - 1, 0.36, left=1, color=OTHER)
        axes.barh(place - 0.2, middle - 1, 0.36, left=1, color=OURS if middle >= 1 else LOST)
        axes.plot([min(best), max(best)], [place - 0.2] * 2, color="black", linewidth=1)
        axes.annotate(f"{middle:.2f}×", (1.005, place), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    _factors(axes.xaxis, axes.set_xscale)
    axes.set_yticks(range(len(groups)), [group for group, _ in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel("time of the alternative / ours; right of the line ours is quicker")
    handles = [patch(OURS, "fastest alternative"), patch(LOST, "the same, where it is quicker than ours"),
               patch(OTHER, "naive torch, or torch.nn")]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)
    bare(axes)
    return figure


def _factors(axis, set_scale: Callable) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    set_scale("log", base=2)
    axis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    axis.set_minor_formatter(NullFormatter())


def roofline(results: dict):
    """Each kernel at the operations it has for each byte, and at those it does a second, under the two ceilings."""
    rows = [row for row in results["rows"] if row.get("flops") and row.get("bytes")]
    if not rows:
        return None
    copy, matmul = results["rooflines"]["copy_gb_per_s"], results["rooflines"]["matmul_gflop_per_s"]
    figure, axes = subplots(figsize=(8.5, 5.6))
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 2, max(*intensities, *(rate / copy for rate in matmul.values())) * 3
    for dtype, rate in matmul.items():
        ridge = rate / copy
        axes.plot([left, ridge, right], [left * copy, rate, rate], color="black", linewidth=1)
        axes.annotate(
            f"matmul {dtype}, {rate:.0f} GFLOP/s", (right, rate), (0, 3), textcoords="offset points", ha="right"
        )
    lower = min(matmul.values()) / copy / 4  # where the slope is free of the other ceilings' names
    axes.annotate(f"copy, {copy:.1f} GB/s", (lower, lower * copy), (-6, 4), textcoords="offset points", ha="right")
    ops = list(dict.fromkeys(op_of(row) for row in rows))
    colours = {op: _colour(place, len(ops)) for place, op in enumerate(ops)}
    for row, intensity in zip(rows, intensities, strict=True):
        rate = row["flops"] / row["times"][row["ours"]]["median_us"] / 1e3
        hollow = "backward" in row["group"]
        marker, colour = MARKERS.get(row["dtype"], "o"), [colours[op_of(row)]]
        axes.scatter(intensity, rate, 30, edgecolors=colour, facecolors="none" if hollow else colour, marker=marker)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("operations for each byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.25)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    handles = [dot(colours[op], "o", op) for op in ops] + [dot("black", MARKERS.get(d, "o"), d) for d in dtypes]
    handles.append(dot("black", "o", "with backward", hollow=True))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    bare(axes)
    return figure


def op_of(row: dict) -> str:
    """The op that a group is about: the group's name without how it is called."""
    known = ("linear cross entropy", "cross entropy", "decode attention", "attention", "bias act", "embedding")
    return next((op for op in (*known, "layer norm", "log softmax top k") if op in row["group"]), row["group"])


def _colour(place: int, count: int) -> tuple:
    import matplotlib

    return matplotlib.colormaps["tab10" if count <= 10 else "tab20"](place)


PICTURES: dict[str, tuple[Callable, str]] = {
    "speedups": (speedups, "Speed-ups"),
    "roofline": (roofline, "Roofline"),
    "scaling": (plots_growth.scaling, "How times grow"),
    "memory": (plots_growth.memory, "Memory"),
    "memory_growth": (plots_growth.memory_growth, "How memory grows"),
}


def main(arguments: list[str]) -> int:
    """The pictures of a result that is there already."""
    if len(arguments) not in (1, 2):
        sys.stderr.write((__doc__ or "") + "\n")
        return 2
    path = Path(arguments[0])
    results = json.loads(path.read_text())
    folder = Path(arguments[1]) if len(arguments) == 2 else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for written in write(results, folder / path.name):
        sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
