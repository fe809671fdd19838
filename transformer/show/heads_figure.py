"""Attention heads as figures for papers: links between two columns of tokens, and a grid of layers × heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fused_transformer.maps import KINDS, AttentionMaps
from fused_transformer.show.picture import COLORS, INK, SOFT, Picture, name_ticks, new_figure, panels, shown

_FAINTEST = 0.02  # a link below it would not be seen
_WIDE, _HIGH = 4.6, 0.27  # inches of a panel, and of a token's line
_LEFT, _RIGHT = 1.6, 3.0  # where the links begin and end


class View(NamedTuple):
    """What one panel shows.

    maps, kind, layer: which weights. heads: of these.
    token: the query whose links alone are drawn, with a band for each head beside its keys; None: all.
    """

    maps: AttentionMaps
    kind: str
    layer: int
    heads: tuple[int, ...]
    token: int | None

    @property
    def labels(self) -> tuple[Sequence[str], Sequence[str]]:
        return self.maps.rows(self.kind), self.maps.columns(self.kind)


def lines(views: Sequence[View]) -> Picture:
    """Side by side: queries on the left, keys on the right, each head's links in its colour, as opaque as heavy."""
    weights = [view.maps.weights(view.kind)[view.layer].float().tolist() for view in views]
    longest = max(len(labels) for view in views for labels in view.labels)
    figure = new_figure(_WIDE * len(views), _HIGH * (longest + 1.8))
    words = []
    for place, (view, values) in enumerate(zip(views, weights, strict=True)):
        axes = figure.add_axes((place / len(views), 0.0, 1 / len(views), 1.0))
        axes.set_xlim(0, _WIDE)
        axes.set_ylim(0.4 - longest, 2.2)
        axes.axis("off")
        _draw_view(axes, view, values)
        words.append(f"{_title(view)}: {_in_words(view, values)}")
    return Picture(figure, _title(views[0]), ". ".join(words))


def grid(maps: AttentionMaps, kind: str, heads: tuple[int, ...]) -> Picture:
    """The weights of every layer (down) and head (across) as heat maps: white is 0, black is 1."""
    weights = maps.weights(kind)
    rows, columns = list(maps.rows(kind)), list(maps.columns(kind))
    cell = max(1.1, 0.14 * max(len(rows), len(columns)))
    figure, axes = panels(len(weights), len(heads), cell, cell)
    for layer, line in enumerate(axes):
        for place, (one, head) in enumerate(zip(line, heads, strict=True)):
            one.imshow(weights[layer, head].float().tolist(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
            one.tick_params(length=0, labelsize=5)
            one.set_xticks([])
            one.set_yticks([])
            if layer == 0:
                one.set_title(f"head {head}", fontsize=7, color=SOFT)
            if place == 0:
                one.set_ylabel(f"layer {layer}", fontsize=7, color=SOFT)
                if len(rows) <= 40:
                    name_ticks(one.yaxis, rows, fontsize=5)
            if layer == len(axes) - 1 and len(columns) <= 40:
                name_ticks(one.xaxis, columns, fontsize=5, rotation=90)
    figure.subplots_adjust(wspace=0.08, hspace=0.08)
    title = f"{KINDS[kind]}, every layer and head"
    return Picture(figure, title, f"{title}: heat maps of {len(weights)} layers by {len(heads)} heads")


def _draw_view(axes: Any, view: View, weights: list) -> None:
    (rows, columns), heads, token = view.labels, view.heads, view.token
    band = min(0.07, 0.4 / len(heads))
    axes.text(
        _WIDE / 2, 1.75, f"{KINDS[view.kind]}, layer {view.layer}", ha="center", va="center", fontsize=8, color=SOFT
    )
    _draw_key(axes, heads)
    for index, label in enumerate(rows):
        _write(axes, _LEFT - 0.1, -index, label, "right", token not in (None, index))
    for index, label in enumerate(columns):
        _write(axes, _RIGHT + (0.1 if token is None else 0.12 + band * len(heads)), -index, label, "left", False)
    lane = min(0.08, 0.5 / len(heads))
    links = [
        (weights[head][row][column], place, row, column)
        for place, head in enumerate(heads)
        for row in (range(len(rows)) if token is None else (token,))
        for column in range(len(columns))
    ]
    for weight, place, row, column in sorted(links):
        if weight < _FAINTEST:
            continue
        look = {"color": COLORS[heads[place] % len(COLORS)], "alpha": min(weight, 1.0)}
        shift = (place - (len(heads) - 1) / 2) * lane
        axes.plot((_LEFT, _RIGHT), (-row - shift, -column - shift), linewidth=1.6, solid_capstyle="round", **look)
        if token is not None:
            axes.bar(_RIGHT + 0.06 + band * place, 0.8, band, -column - 0.4, align="edge", linewidth=0, **look)


def _draw_key(axes: Any, heads: tuple[int, ...]) -> None:
    """A square in each head's colour, with its number."""
    size = min(0.24, 2.8 / len(heads))
    for place, head in enumerate(heads):
        x = _WIDE / 2 + (place - (len(heads) - 1) / 2) * size
        axes.bar(x, 0.8, size * 0.9, 0.55, color=COLORS[head % len(COLORS)], linewidth=0)
        axes.text(x, 0.93, str(head), ha="center", va="center", fontsize=6.5 if size > 0.2 else 4, color="white")


def _write(axes: Any, x: float, y: float, label: str, side: str, faint: bool) -> None:
    color = SOFT if faint else INK
    axes.text(x, y, shown(label), ha=side, va="center", fontsize=9, color=color, parse_math=False)


def _title(view: View) -> str:
    heads = f"head {view.heads[0]}" if len(view.heads) == 1 else f"heads {', '.join(map(str, view.heads))}"
    return f"{KINDS[view.kind]}, layer {view.layer}, {heads}"


def _in_words(view: View, weights: list) -> str:
    """Which key each query (or the one) attends to most, on average over the heads."""
    (rows, columns), heads, said = view.labels, view.heads, []
    for row in range(len(rows)) if view.token is None else (view.token,):
        means = [sum(weights[head][row][column] for head in heads) / len(heads) for column in range(len(columns))]
        best = max(range(len(columns)), key=means.__getitem__)
        said.append(f"{rows[row]} most to {columns[best]} ({means[best]:.0%})")
    return "; ".join(said)
