"""Curves and memory as tables on the terminal, and as Markdown."""

from __future__ import annotations


def title(curve: dict) -> str:
    return f"{curve['name']}, by {curve['along']}"


def curve_table(curve: dict) -> list[str]:
    """A line for each size, a column for each implementation, and the power of the size that each grows with."""
    labels = [curve["ours"], *(label for label in curve["values"] if label != curve["ours"])]
    what = "time" if curve["unit"] == "µs" else "memory"
    lines = [f"{title(curve)}: {what} ({curve['fixed']})"]
    lines += [f"{curve['along']:>12}" + "".join(f"  {plain(label):>14}" for label in labels)]
    for place, size in enumerate(curve["sizes"]):
        cells = (value(curve["values"][label][place], curve["unit"]) for label in labels)
        lines.append(f"{size:>12}" + "".join(f"  {cell:>14}" for cell in cells))
    slopes = (curve["slopes"][label] for label in labels)
    cells = ("-" if slope is None else f"^{slope:.2f}" for slope in slopes)
    return [*lines, f"{'grows with':>12}" + "".join(f"  {cell:>14}" for cell in cells)]


def value(x: float | None, unit: str) -> str:
    if x is None:
        return "-"
    if unit == "bytes":
        return f"{x / 1e6:.2f} MB"
    return f"{x / 1e3:.2f} ms" if x >= 1e3 else f"{x:.1f} µs"


def memory_table(held: list[dict]) -> list[str]:
    """Ours in megabytes, and every other implementation as a multiple of it."""
    labels = list(dict.fromkeys(label for entry in held for label in entry["peak_bytes"] if label != entry["ours"]))
    names = [f"{entry['name']}, {entry['what']}, {entry['shape']}" for entry in held]
    width = max(map(len, names))
    lines = [f"{'memory at most':<{width}}  {'ours':>10}" + "".join(f"  {plain(x):>15}" for x in labels)]
    for name, entry in zip(names, held, strict=True):
        own = entry["peak_bytes"][entry["ours"]]
        cells = [_times(entry["peak_bytes"].get(label), own) for label in labels]
        lines.append(f"{name:<{width}}  {own / 1e6:>7.2f} MB" + "".join(f"  {cell:>15}" for cell in cells))
    return lines


def plain(label: str) -> str:
    """ "ours in chunks" for "fused in chunks"; an alternative's name as it is."""
    return label.replace("fused", "ours", 1) if label.partition(" ")[0] == "fused" else label


def _times(peak: int | None, own: int) -> str:
    if peak is None:
        return "-"
    return f"{peak / own:.2f}×" if own else f"{peak / 1e6:.2f} MB"


def text(curves: list[dict], held: list[dict]) -> list[str]:
    lines: list[str] = []
    for curve in curves:
        lines += ["", *curve_table(curve)]
    if curves:
        lines += ["", "^p: grows as the p-th power of the size, by least squares over the larger half of the sizes"]
    return lines + (["", *memory_table(held)] if held else [])


def markdown(curves: list[dict], held: list[dict]) -> list[str]:
    """The powers alone, and memory; nothing where a result has neither."""
    lines: list[str] = []
    if curves:
        lines += ["", "| grows as a power of the size | sizes | ours | others |", "|---|---|--:|---|"]
    for curve in curves:
        what = "time" if curve["unit"] == "µs" else "memory"
        powers = {label: f"{slope:.2f}" for label, slope in curve["slopes"].items() if slope is not None}
        others = ", ".join(f"{label} {power}" for label, power in powers.items() if label != curve["ours"])
        sizes = f"{curve['sizes'][0]:,} to {curve['sizes'][-1]:,}"
        lines.append(f"| {what} of {title(curve)} | {sizes} | {powers.get(curve['ours'], '-')} | {others} |")
    if held:
        lines += ["", "| memory at most | ours | others |", "|---|--:|---|"]
    for entry in held:
        own = entry["peak_bytes"][entry["ours"]]
        others = ", ".join(f"{plain(label)} {peak / 1e6:.2f} MB" for label, peak in entry["peak_bytes"].items()
                           if label != entry["ours"])  # fmt: skip
        lines.append(f"| {entry['name']}, {entry['what']}, {entry['shape']} | {own / 1e6:.2f} MB | {others} |")
    return lines
