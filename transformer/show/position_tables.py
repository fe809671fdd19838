"""Tables of positions as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from fused_transformer.embedding import Layout
from fused_transformer.kernels import sinusoidal_positions
from fused_transformer.show.picture import SOFT, Picture, panels

NAMES = {
    "interleaved": "interleaved: sines and cosines by turns (the paper)",
    "concat_t2t": "concat_t2t: all sines, then all cosines (tensor2tensor)",
    "concat_paper": "concat_paper: all sines, then all cosines, with the paper's frequencies",
}
_TUTORIAL = {"interleaved": (10, 64)}  # the sizes of The Illustrated Transformer's second picture


def positions(
    table: Any = None,
    *,
    length: int | None = None,
    width: int | None = None,
    layouts: str | Sequence[str] = ("concat_t2t", "interleaved"),
) -> Picture:
    """Heat maps of position tables: a row for each position, a column for each of the model's dimensions.

        show.positions()                       both layouts, as The Illustrated Transformer draws them
        show.positions(model, length=50)       the table that this model adds to its embeddings

    Args:
        table: a Transformer, whose layout and width are drawn; or a table of your own, (L, E); None: `layouts` at
            `width`.
        length: positions drawn, of a layout; None: 20, or 10 of "interleaved".
        width: E, of a layout; None: 512, or 64 of "interleaved", whose columns alternate.
        layouts: one, or several to be drawn one above the other: "concat_t2t", "interleaved", "concat_paper".

    Raises:
        ValueError: there is no such layout, a number is below 1, a model has no positions, or a table is not 2-D.
        ModuleNotFoundError: matplotlib is not installed.
    """
    for name, number in (("length", length), ("width", width)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    tables = _tables(table, length, width, (layouts,) if isinstance(layouts, str) else tuple(layouts))
    figure, axes = panels(len(tables), 1, 7.5, 2.6)
    for (one,), (name, values) in zip(axes, tables.items(), strict=True):
        limit = max(1.0, float(values.abs().max()))
        image = one.imshow(
            values.tolist(), cmap="RdYlBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        one.set_title(name, fontsize=9, loc="left")
        one.set_xlabel("dimension", fontsize=8, color=SOFT)
        one.set_ylabel("position", fontsize=8, color=SOFT)
        one.tick_params(labelsize=7)
        one.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=one, pad=0.02).ax.tick_params(labelsize=7)
    figure.subplots_adjust(hspace=0.55)
    words = [
        f"{name}, {rows} positions by {columns} dimensions" for name, x in tables.items() for rows, columns in [x.shape]
    ]
    return Picture(figure, "Positions", f"Heat maps of position tables: {'; '.join(words)}")


def _tables(table: Any, length: int | None, width: int | None, layouts: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(table, Tensor):
        if table.dim() != 2 or 0 in table.shape:
            raise ValueError(f"a table of positions must be (L, E), got {tuple(table.shape)}")
        return {f"{table.shape[0]} positions of {table.shape[1]} dimensions": table.detach().float().cpu()}
    if table is not None:
        if not hasattr(table, "config"):
            raise TypeError(f"table must be a Transformer, a torch.Tensor or None, got {type(table).__name__}")
        if table.config.positions is None:
            raise ValueError("the model has no positions to draw: its configuration says positions=None")
        layouts, width = (table.config.positions,), table.config.d_model
    if not layouts or not all(layout in NAMES for layout in layouts):
        raise ValueError(f"layouts must be of {', '.join(map(repr, NAMES))}, got {', '.join(map(repr, layouts))}")
    tables = {}
    for layout in layouts:
        rows, columns = _TUTORIAL.get(layout, (20, 512))
        sizes = (rows if length is None else length, columns if width is None else width)
        tables[NAMES[layout]] = sinusoidal_positions(*sizes, layout=cast(Layout, layout), device="cpu")
    return tables
