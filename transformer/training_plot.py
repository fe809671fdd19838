"""Curves of one or several trainings from their logs: loss, learning rate and BLEU against steps and minutes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_transformer.show.picture import COLORS, INK, RULE, SOFT, Picture, panels
from fused_transformer.training_log import Entry, read_log


class _Curve(NamedTuple):
    """What of a log is drawn: `values` of the entries of a kind; others is drawn soft behind it."""

    kind: str
    value: str
    style: dict[str, Any]


_VALIDATED: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
_AVERAGED: dict[str, Any] = {"marker": "*", "markersize": 11, "linestyle": "none", "markeredgecolor": "white"}
_ROWS: dict[str, list[_Curve]] = {
    "loss": [
        _Curve("step", "loss", {"linewidth": 1.0, "alpha": 0.5}),
        _Curve("validation", "loss", _VALIDATED),
        _Curve("average", "loss", _AVERAGED),
    ],
    "learning rate": [_Curve("step", "learning_rate", {"linewidth": 1.4})],
    "BLEU": [_Curve("validation", "bleu", _VALIDATED), _Curve("average", "bleu", _AVERAGED)],
}
_AXES = {"steps": lambda entry: entry["step"], "minutes": lambda entry: entry["seconds"] / 60}


def training_curves(paths: Sequence[str | Path]) -> Picture:
    """Draw the logs of trainings, one colour each: the training's loss faint, validations dotted, averages as stars.

    Args:
        paths: folders that `train` wrote, or log files.

    Raises:
        FileNotFoundError: one has no log.
        ValueError: there are no paths, or a log has no entry yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not paths:
        raise ValueError("there is no training to draw")
    logs = [(name, read_log(path)) for name, path in zip(_names(paths), paths, strict=True)]
    for name, log in logs:
        if not log:
            raise ValueError(f"the log of {name} has no entry yet")
    rows = {
        title: curves
        for title, curves in _ROWS.items()
        if any(_points(log, curve, "steps")[0] for _, log in logs for curve in curves)
    }
    figure, axes = panels(len(rows), len(_AXES), 5.2, 2.5)
    for line, (title, curves) in zip(axes, rows.items(), strict=True):
        for ax, across in zip(line, _AXES, strict=True):
            for (_, log), color in zip(logs, _colors(len(logs)), strict=True):
                for curve in curves:
                    x, y = _points(log, curve, across)
                    ax.plot(x, y, color=color, **curve.style)
            _dress(ax, title, across, first=ax is line[0], last=line is axes[-1])
    _explain(axes[0][0], [name for name, _ in logs], with_training="loss" in rows, logs=[log for _, log in logs])
    figure.tight_layout(h_pad=0.8)
    title = "Training: " + ", ".join(name for name, _ in logs)
    return Picture(figure, title, f"{', '.join(rows)} of {', '.join(name for name, _ in logs)} by steps and minutes")


def _names(paths: Sequence[str | Path]) -> list[str]:
    """What tells the paths apart: their last parts, as many as it takes."""
    full = [Path(os.path.abspath(path)) for path in paths]
    full = [path.parent if path.is_file() else path for path in full]
    for count in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-count:]) for path in full]
        if len(set(names)) == len({*full}):
            break
    return names


def _points(log: list[Entry], curve: _Curve, across: str) -> tuple[list[float], list[float]]:
    points = [
        (_AXES[across](entry), entry[curve.value])
        for entry in log
        if entry["kind"] == curve.kind and entry.get(curve.value) is not None
    ]
    return [x for x, _ in points], [y for _, y in points]


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _dress(ax: Any, title: str, across: str, first: bool, last: bool) -> None:
    ax.set_ylabel(title if first else "", color=INK)
    ax.set_xlabel(across if last else "", color=INK)
    ax.set_xlim(left=0)
    if title != "loss":
        ax.set_ylim(bottom=0)
    if title == "learning rate":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    ax.grid(color=RULE, linewidth=0.6)
    ax.tick_params(colors=SOFT, labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(RULE)


def _explain(ax: Any, names: list[str], with_training: bool, logs: list[list[Entry]]) -> None:
    """The legend: what a line is where one training is drawn, which training it is where several are."""
    from matplotlib.lines import Line2D

    if len(names) > 1:
        handles = [Line2D([], [], color=color, linewidth=1.6) for color in _colors(len(names))]
        ax.legend(handles, names, fontsize=8, frameon=False)
        return
    kinds = {entry["kind"] for log in logs for entry in log}
    labels = {"step": "training", "validation": "validation", "average": "average of checkpoints"}
    shown = [(curve, labels[curve.kind]) for curve in _ROWS["loss"] if curve.kind in kinds]
    if with_training and len(shown) > 1:
        handles = [Line2D([], [], color=COLORS[0], **curve.style) for curve, _ in shown]
        ax.legend(handles, [label for _, label in shown], fontsize=8, frameon=False)
