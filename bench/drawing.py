"""Colours and the small parts that pictures of results are drawn with."""

from __future__ import annotations

OURS, OURS_TOO, LOST, OTHER = "#2a7f62", "#7fb8a0", "#b5483b", "#9aa5b1"
LINES = ("#4a6fa5", "#c98b2b", "#8a5a9e", "#6b7280", "#b5483b", "#c76fa3")


def subplots(*args, **options):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "svg.fonttype": "path", "font.size": 9}
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=options.pop("figsize"))
    return figure, figure.subplots(*args, **options)


def bare(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def patch(colour: str, label: str):
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def dot(colour, marker: str, label: str, *, hollow: bool = False):
    from matplotlib.lines import Line2D

    inside = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, linestyle="", label=label, markerfacecolor=inside, markersize=5)
