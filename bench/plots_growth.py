"""Pictures of how times and memory grow, and of what each piece of work holds."""

from __future__ import annotations

import math
from itertools import cycle

from bench.drawing import LINES, OURS, OURS_TOO, bare, patch, subplots
from bench.report_growth import plain


def scaling(results: dict):
    """A panel for each curve of times, each line with the power that it grows with."""
    return _panels([curve for curve in results.get("curves", []) if curve["unit"] == "µs"])


def _panels(curves: list[dict]):
    if not curves:
        return None
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, grid = subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines), squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for curve, axes in zip(curves, grid.flat, strict=False):
        _panel(curve, axes)
    return figure


def _panel(curve: dict, axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    scale = 1e3 if curve["unit"] == "µs" else 1e6
    others = iter(LINES)
    for label, values in sorted(curve["values"].items(), key=lambda item: item[0] != curve["ours"]):
        ours = label == curve["ours"]
        points = [(size, value / scale) for size, value in zip(curve["sizes"], values, strict=True) if value]
        power = curve["slopes"][label]
        told = ("ours" if ours else label) + ("" if power is None else f": power {power:.2f}")
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=2 if ours else 1.2, label=told,
                  color=OURS if ours else next(others))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda size, _: _short(size))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(curve) < 1.5 else (1,)))
    axes.yaxis.set_major_formatter(lambda amount, _: f"{amount:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{curve['name']}\n{curve['fixed']}", fontsize=8)
    axes.set_xlabel(curve["along"])
    axes.set_ylabel("ms" if curve["unit"] == "µs" else "MB")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
    bare(axes)


def _decades(curve: dict) -> float:
    values = [value for of_label in curve["values"].values() for value in of_label if value]
    return math.log10(max(values) / min(values))


def _short(size: float) -> str:
    return f"{size / 1024:g}k" if size >= 1024 else f"{size:g}"


def memory(results: dict):
    """What each piece of work holds at most, by implementation."""
    held = results.get("memory", [])
    if not held:
        return None
    labels = list(dict.fromkeys(label for entry in held for label in entry["peak_bytes"]))
    labels.sort(key=lambda label: label.partition(" ")[0] != "fused")
    palette = cycle(LINES)  # of many alternatives two share a colour; the numbers beside the bars are what is read
    colours = {label: OURS if label == "fused" else OURS_TOO if label.startswith("fused ") else next(palette)
               for label in labels}  # fmt: skip
    figure, axes = subplots(figsize=(8.5, 1.0 + 0.16 * sum(len(entry["peak_bytes"]) + 1 for entry in held)))
    place, ticks = 0.0, []
    for entry in held:
        mine = [label for label in labels if label in entry["peak_bytes"]]
        ticks.append((place + (len(mine) - 1) / 2, f"{entry['name']}, {entry['what']}"))
        for label in mine:
            megabytes = max(entry["peak_bytes"][label] / 1e6, 1e-3)
            axes.barh(place, megabytes, 0.9, color=colours[label])
            axes.annotate(
                f"{megabytes:.3g}", (megabytes, place), (3, 0), textcoords="offset points", va="center", size=6
            )
            place += 1
        place += 1
    axes.set_xscale("log")
    axes.set_yticks([middle for middle, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel("MB held at most, beyond what was given")
    handles = [patch(colours[label], plain(label)) for label in labels]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    bare(axes)
    return figure


def memory_growth(results: dict):
    """Memory as a size grows."""
    return _panels([curve for curve in results.get("curves", []) if curve["unit"] == "bytes"])
