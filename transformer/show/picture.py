"""A drawn figure: what `show` returns where matplotlib draws. matplotlib is imported when something is drawn."""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, RULE = "#1c2330", "#5d6675", "#c9d0da"
BLUE, GREEN, ORANGE = "#0072b2", "#008a63", "#cc4a00"
# The page's colours (heads.css); further heads repeat them.
COLORS = ("#0072b2", "#d98a00", "#008a63", "#cc4a00", "#b65592", "#2f9fd8", "#a39400", "#6b7280")
FORMATS = (".svg", ".png", ".pdf")
# Tried in this order for each character; those that a machine lacks are left out.
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Hebrew",
          "Noto Sans Devanagari", "Noto Emoji")  # fmt: skip

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; padding: 1rem; font: 16px/1.4 system-ui, sans-serif; }}
figure {{ margin: 0; overflow-x: auto; }}
svg {{ background: #fff; border-radius: 0.3rem; }}
</style>
</head>
<body>
<figure role="img" aria-label="{alternative}">
{drawing}
</figure>
</body>
</html>
"""


class Picture:
    """A figure of matplotlib's (`figure`), what it is called (`title`), and what it shows in words (`alternative`).

    In Jupyter it displays itself.
    """

    def __init__(self, figure: Figure, title: str, alternative: str) -> None:
        self.figure, self.title, self.alternative = figure, title, alternative

    def to_bytes(self, kind: str) -> bytes:
        """The figure as "svg", "png" or "pdf". The same figure gives the same bytes."""
        buffer = io.BytesIO()
        with _style():
            options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
            if kind == "pdf":
                options = {"metadata": {"CreationDate": None}}
            self.figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", pad_inches=0.08, **options)
        return buffer.getvalue()

    @property
    def html(self) -> str:
        """One page with the figure in it, which needs no network and no other file."""
        svg = self.to_bytes("svg").decode()
        names = {"title": self.title, "alternative": self.alternative}
        return _PAGE.format(**{k: html.escape(v) for k, v in names.items()}, drawing=svg[svg.index("<svg") :])

    def save(self, path: str | Path) -> Path:
        """Write it as the name's ending says: .svg, .png, .pdf, or .html; returns the path.

        Raises:
            ValueError: the name has another ending.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in (".html", ".htm"):
            path.write_text(self.html, encoding="utf-8", errors="replace")
        elif suffix in FORMATS:
            path.write_bytes(self.to_bytes(suffix[1:]))
        else:
            raise ValueError(f"{path.name} must end with .html, {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
        return path

    def _repr_png_(self) -> bytes:
        return self.to_bytes("png")


def require_matplotlib() -> None:
    """Nothing, where it is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing a figure needs matplotlib, which is not installed: pip install 'fused-transformer[show]' "
            "(the page of attention heads, .html, does without)",
            name=error.name,
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, outside of pyplot and whatever state it has.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Any]]]:
    """A figure of rows × columns axes, each of so many inches, and the axes."""
    figure = new_figure(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def name_ticks(axis: Any, labels: list[str], **options: Any) -> None:
    """A tick at 0, 1, ... for each label, taken as it is: "$" begins no formula, and "" is left blank."""
    axis.set_ticks(range(len(labels)))
    axis.set_ticklabels([label and shown(label) for label in labels], parse_math=False, **options)


def shown(label: str, longest: int = 24) -> str:
    """The label as it can be drawn: what could not be seen is made visible, and what is very long is cut."""
    if not label.strip(" "):
        return "␣" * len(label) or "(empty)"
    label = "".join(chr(0x2400 + ord(c)) if c < " " else c for c in label)
    label = label.encode("utf-8", errors="replace").decode()  # half a surrogate pair has no glyph and no UTF-8
    return label if len(label) <= longest else label[: longest - 1] + "…"


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    style: dict[Any, Any] = {
        "font.family": [name for name in _FONTS if name in there] or ["sans-serif"],
        "svg.fonttype": "none",  # text stays text: it can be searched, and the viewer has glyphs that we lack
        "svg.hashsalt": "fused_transformer",
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield
