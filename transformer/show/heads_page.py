"""Attention heads as a page: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

import base64
import html
import json
import unicodedata
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from fused_transformer.maps import KINDS, AttentionMaps
from fused_transformer.show.heads_figure import View, grid, lines
from fused_transformer.show.picture import Picture

ALL = "all"
# tensor2tensor's names, and ours, by what is typed.
NAMES = {name.lower(): kind for kind, name in KINDS.items()} | {kind: kind for kind in KINDS} | {ALL: ALL}


class Heads:
    """The attention heads of one sentence, ready to look at; made by `show.heads`.

    In Jupyter it displays itself. `save` writes the page, or a figure.

    Attributes:
        maps: the weights.
        kind: "encoder_self", "encoder_decoder", "decoder_self" or "all"; layer, heads: what is shown first.
        token: number of the query (on the left) whose links alone are shown first; None: all links.
        title: of the page.
    """

    def __init__(
        self, maps: AttentionMaps, kind: str, layer: int, heads: tuple[int, ...], token: int | None, title: str
    ) -> None:
        self.maps, self.kind, self.layer, self.heads, self.token, self.title = maps, kind, layer, heads, token, title

    @property
    def html(self) -> str:
        """The page. Weights are in it as bytes, so exact to 0.2 %; it grows with the square of the sentence."""
        here = files("fused_transformer.show")
        parts = {part: (here / f"heads.{part}").read_text(encoding="utf-8") for part in ("html", "css", "js")}
        return Template(parts["html"]).substitute(
            title=html.escape(self.title), style=parts["css"], script=parts["js"], data=_json(self._data())
        )

    def save(self, path: str | Path) -> Path:
        """Write the page (.html), or the figure of what is shown first (.png, .svg, .pdf); returns the path.

        Raises:
            ValueError: the name has another ending.
            ModuleNotFoundError: a figure needs matplotlib, and it is not installed.
        """
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            return self.figure().save(path)
        path.write_text(self.html, encoding="utf-8", errors="replace")
        return path

    def figure(self) -> Picture:
        """The links of the layer and heads that are shown first, as a figure for a paper: one head, two, or all.

        Raises:
            ValueError: the attention shown is "all", which is for the page alone.
            ModuleNotFoundError: matplotlib is not installed.
        """
        return side_by_side(self)

    def grid(self) -> Picture:
        """The weights of this kind of attention as heat maps, a row for each layer, a column for each head shown.

        Raises: as `figure`.
        """
        return grid(self.maps, self.kind, self.heads)

    def _repr_html_(self) -> str:
        # A frame of its own: neither the notebook's styles nor ours reach into the other.
        rows = max(len(self.maps.source), len(self.maps.target))
        height = min(230 + 27 * (2 * rows if self.kind == ALL else rows), 900)
        page = html.escape(self.html, quote=True)
        style = f"width: 100%; height: {height}px; border: 0"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Attention heads" style="{style}"></iframe>'

    def _data(self) -> dict[str, Any]:
        view = {"kind": self.kind, "layer": self.layer, "heads": self.heads, "token": self.token}
        kinds = {}
        for kind in self.maps.kinds:
            weights = self.maps.weights(kind)
            sizes = dict(zip(("layers", "heads", "rows", "columns"), weights.shape, strict=True))
            levels = (weights.detach().float().clamp(0, 1) * 255).round().byte().cpu().contiguous()
            kinds[kind] = sizes | {"weights": base64.b64encode(levels.numpy().tobytes()).decode()}
        return {"source": self.maps.source, "target": self.maps.target, "kinds": kinds, "view": view}


def heads(
    maps: AttentionMaps,
    *,
    attention: str | None = None,
    layer: int = -1,
    heads: Sequence[int] | None = None,
    token: int | str | None = None,
    title: str | None = None,
) -> Heads:
    """A page of attention heads: the tokens left and right, and between them each head's links in its colour.

        show.heads(maps).save("it.html")            a page to click through, of one file, without network
        show.heads(maps, heads=[2]).save("it.svg")  a figure of one head; needs matplotlib

    The page has menus of the kind of attention (tensor2tensor's: All, Input - Input, Input - Output, Output - Output)
    and of the layer; heads are shown and hidden by a click. A link's opacity is its weight.

    Args:
        maps: of one sentence, as `attention_maps` gives them.
        attention: what is shown first: "encoder_self", "encoder_decoder", "decoder_self" or "all", or tensor2tensor's
            name of it; None: the first kind that there is.
        layer: the layer shown first, from 0; negative ones count from the last.
        heads: the heads shown first, from 0; None: all.
        token: the query whose links alone are shown first: its number, or a label (the first such token; "it" finds
            "▁it" too). None: all.
        title: of the page; None: the source.

    Raises:
        TypeError: maps are no AttentionMaps.
        ValueError: there is no such attention, layer, head or token.
    """
    if not isinstance(maps, AttentionMaps):
        hint = "; of a list take one: show.heads(maps[0])" if isinstance(maps, list) else ""
        raise TypeError(f"maps must be AttentionMaps, got {type(maps).__name__}{hint}")
    kind = _kind(maps, attention)
    kinds = maps.kinds if kind == ALL else (kind,)
    layers, count = (min(maps.weights(one).shape[axis] for one in kinds) for axis in (0, 1))
    if not -layers <= layer < layers:
        raise ValueError(f"layer must be between 0 and {layers - 1}, or negative to count from the last, got {layer}")
    chosen = tuple(range(count)) if heads is None else tuple(heads)
    if not chosen or not all(0 <= head < count for head in chosen) or len({*chosen}) < len(chosen):
        raise ValueError(f"heads must be different numbers between 0 and {count - 1}, got {list(chosen)}")
    return Heads(
        maps,
        kind,
        layer % layers,
        tuple(sorted(chosen)),
        _token(maps, kind, token),
        _title(maps.source or maps.target[1:]) if title is None else title,
    )


def side_by_side(*heads: Heads) -> Picture:
    """What each of these shows first, as the panels of one figure.

    Raises:
        ValueError: there are none, or one shows "all", which is for the page alone.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not heads:
        raise ValueError("side_by_side needs the heads of one sentence at least")
    return lines([View(one.maps, one.kind, one.layer, one.heads, one.token) for one in heads])


def _kind(maps: AttentionMaps, attention: str | None) -> str:
    if attention is None:
        return maps.kinds[0]
    kind = NAMES.get(attention.lower(), attention)
    choices = [*maps.kinds, ALL] if len(maps.kinds) == len(KINDS) else [*maps.kinds]
    if kind not in choices:
        raise ValueError(f"attention must be one of {', '.join(map(repr, choices))}, got {attention!r}")
    if kind == ALL and len({maps.weights(one).shape[1] for one in maps.kinds}) > 1:
        raise ValueError("attention 'all' needs as many heads in the encoder as in the decoder")
    return kind


def _token(maps: AttentionMaps, kind: str, token: int | str | None) -> int | None:
    if token is None:
        return None
    labels = [*maps.rows("encoder_self"), *maps.rows("decoder_self")] if kind == ALL else [*maps.rows(kind)]
    return number_of(labels, token, "queries")


def number_of(labels: Sequence[str], token: int | str, among: str) -> int:
    """The number of a token, given as itself or by label: the first such; "it" finds "▁it" too.

    Raises:
        ValueError: there is none.
    """
    if isinstance(token, str):
        for label in (token, f"▁{token}"):  # a vocabulary's mark of a word's beginning can be left out
            if label in labels:
                return labels.index(label)
        raise ValueError(f"there is no token {token!r} among the {among}: {' '.join(labels)}")
    if not 0 <= token < len(labels):
        raise ValueError(f"token must be between 0 and {len(labels) - 1}, got {token}")
    return token


def _title(labels: Sequence[str]) -> str:
    """The tokens as one line, without characters that control a terminal or turn the text around them."""
    steering = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return " ".join(
        "".join(
            c
            for c in label
            if unicodedata.bidirectional(c) not in steering and unicodedata.category(c) not in ("Cc", "Cs")
        )
        for label in labels
    )


def _json(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element: with nothing that could end it, and ASCII alone."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
