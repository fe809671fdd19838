"""Attention heads as figures for papers: links between two columns of tokens, and a grid of layers × heads."""

from __future__ import annotations

from typing import Any

from fused_transformer.maps import KINDS, AttentionMaps
from fused_transformer.show.picture import COLORS, INK, SOFT, Picture, name_ticks, new_figure, panels, shown

_FAINTEST = 0.02  # a link below it would not be seen


def lines(maps: AttentionMaps, kind: str, layer: int, heads: tuple[int, ...], token: int | None = None) -> Picture:
    """Queries on the left, keys on the right, and each head's links in its colour, as opaque as they are heavy.

    Args:
        maps, kind: which weights; layer, heads: of them these.
        token: the query whose links alone are drawn, with a band for each head beside its keys; None: all.
    """
    weights = maps.weights(kind)[layer].float().tolist()
    rows, columns = maps.rows(kind), maps.columns(kind)
    height = 0.27 * (max(len(rows), len(columns)) + 1.8)
    figure = new_figure(4.6, height)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 4.6)
    axes.set_ylim(0.4 - max(len(rows), len(columns)), 2.2)
    axes.axis("off")
    left, right, band = 1.6, 3.0, min(0.07, 0.4 / len(heads))
    right_text = right + (0.1 if token is None else 0.12 + band * len(heads))
    for index, label in enumerate(rows):
        _write(axes, left - 0.1, -index, label, "right", token not in (None, index))
    for index, label in enumerate(columns):
        _write(axes, right_text, -index, label, "left", False)
    links = [
        (weights[head][row][column], head, row, column)
        for head in heads
        for row in (range(len(rows)) if token is None else (token,))
        for column in range(len(columns))
    ]
    lane = min(0.08, 0.5 / len(heads))
    for weight, head, row, column in sorted(links):
        if weight < _FAINTEST:
            continue
        color, shift = COLORS[head % len(COLORS)], (heads.index(head) - (len(heads) - 1) / 2) * lane
        ends = (-row - shift, -column - shift)
        axes.plot((left, right), ends, color=color, alpha=min(weight, 1.0), linewidth=1.6, solid_capstyle="round")
        if token is not None:
            x = right + 0.06 + band * heads.index(head)
            axes.bar(x, 0.8, band, -column - 0.4, align="edge", color=color, alpha=min(weight, 1.0), linewidth=0)
    axes.text(2.3, 1.75, f"{KINDS[kind]}, layer {layer}", ha="center", va="center", fontsize=8, color=SOFT)
    _draw_key(axes, heads)
    named = f"head {heads[0]}" if len(heads) == 1 else f"heads {', '.join(map(str, heads))}"
    title = f"{KINDS[kind]}, layer {layer}, {named}"
    return Picture(figure, title, f"{title}: {_in_words(weights, heads, rows, columns, token)}")


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


def _draw_key(axes: Any, heads: tuple[int, ...]) -> None:
    """A square in each head's colour, with its number."""
    size = min(0.24, 2.8 / len(heads))
    for place, head in enumerate(heads):
        x = 2.3 + (place - (len(heads) - 1) / 2) * size
        axes.bar(x, 0.8, size * 0.9, 0.55, color=COLORS[head % len(COLORS)], linewidth=0)
        axes.text(x, 0.93, str(head), ha="center", va="center", fontsize=6.5 if size > 0.2 else 4, color="white")


def _write(axes: Any, x: float, y: float, label: str, side: str, faint: bool) -> None:
    color = SOFT if faint else INK
    axes.text(x, y, shown(label), ha=side, va="center", fontsize=9, color=color, parse_math=False)


def _in_words(weights: list, heads: tuple[int, ...], rows: Any, columns: Any, token: int | None) -> str:
    """Which key each query (or the one) attends to most, on average over the heads."""
    said = []
    for row in range(len(rows)) if token is None else (token,):
        means = [sum(weights[head][row][column] for head in heads) / len(heads) for column in range(len(columns))]
        best = max(range(len(columns)), key=means.__getitem__)
        said.append(f"{rows[row]} most to {columns[best]} ({means[best]:.0%})")
    return "; ".join(said)
