"""The tree of a beam search, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fused_transformer.beam_tree import DROPPED, FINISHED, KEPT, BeamTree, Node, TreeRecorder
from fused_transformer.decoding import generate
from fused_transformer.maps import Labels
from fused_transformer.search_options import SearchOptions
from fused_transformer.show.picture import BLUE, GREEN, INK, RULE, SOFT, Picture, new_figure, shown

if TYPE_CHECKING:
    from fused_transformer.decoding import Model

_LOOKS: dict[str, dict[str, Any]] = {
    KEPT: {"facecolor": "#e6f0f8", "edgecolor": BLUE},
    FINISHED: {"facecolor": "#dff3ec", "edgecolor": GREEN},
    DROPPED: {"facecolor": "white", "edgecolor": RULE, "linestyle": "--"},
}
_WIDE, _HIGH = 1.25, 0.44  # inches of a step and of a node's line


def trace_beams(model: Model, source: Tensor, options: SearchOptions | None = None, **changes: Any) -> list[BeamTree]:
    """Beam search of each sentence, and all that it looked at on its way.

    Args:
        model: a Transformer, or one packed for translation.
        source: (B, S) int64, right-padded.
        options: None: the paper's.
        changes: options by name: trace_beams(model, source, beam_size=3).

    Returns:
        a BeamTree for each sentence; its `best` ends what `generate` returns with the same options.

    Raises:
        ValueError: as `generate`, and where the options ask for no beam search.
    """
    options = replace(options or SearchOptions(), **changes)
    recorder = TreeRecorder(len(source), model.config.bos_idx, options.finished_capacity)
    return recorder.trees(generate(model, source, options=options, on_step=recorder))


def beam(tree: BeamTree, *, labels: Labels | None = None, dropped: bool = True, title: str | None = None) -> Picture:
    """The tree of a beam search: a column for each step, and in it what was kept, what finished and what was dropped.

        (tree,) = trace_beams(model, source)
        show.beam(tree, labels=tokenizer.pieces).save("beam.svg")

    Under a token stands its hypothesis' log-probability, or its score with the length penalty where it ended. The best
    translation is drawn bold.

    Args:
        tree: of one sentence.
        labels: from token numbers to labels, such as `tokenizer.pieces`; None: the numbers.
        dropped: draw what was dropped too.
        title: None: the best translation.

    Raises:
        TypeError: tree is no BeamTree.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not isinstance(tree, BeamTree):
        hint = "; of a list take one: show.beam(trees[0])" if isinstance(tree, list) else ""
        raise TypeError(f"tree must be a BeamTree, as trace_beams gives them, got {type(tree).__name__}{hint}")
    name = labels or (lambda tokens: [str(token) for token in tokens])
    steps = [[node for node in step if dropped or node.state != DROPPED] for step in tree.steps]
    places = _places(steps)
    lines = max((line for _, line in places.values()), default=0) + 1
    figure = new_figure(_WIDE * len(steps) + 0.3, _HIGH * lines + 0.9)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-0.62, len(steps) - 0.35)
    axes.set_ylim(lines - 0.1, -1.9)
    axes.axis("off")
    for node, (x, y) in places.items():
        if node.parent is not None:
            _draw_edge(axes, places[node.parent], (x, y), node)
    for node, (x, y) in places.items():
        _draw_node(axes, x, y, node, name([node.token])[0])
    best = " ".join(name(tree.best.tokens()))
    title = best if title is None else title
    axes.text(-0.55, -1.75, shown(title, 120), ha="left", va="top", fontsize=10, color=INK, parse_math=False)
    _draw_key(axes, dropped)
    return Picture(figure, title, _in_words(tree, name))


def _places(steps: Sequence[Sequence[Node]]) -> dict[Node, tuple[float, float]]:
    """Where each node stands: its step, and its line there: by state, then by how likely it is."""
    order = (KEPT, FINISHED, DROPPED)
    places: dict[Node, tuple[float, float]] = {}
    for x, step in enumerate(steps):
        ranked = sorted(step, key=lambda node: (order.index(node.state), -node.log_prob))
        places |= {node: (float(x), float(y)) for y, node in enumerate(ranked)}
    return places


def _draw_edge(axes: Any, start: tuple[float, float], end: tuple[float, float], node: Node) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    (x0, y0), (x1, y1) = (start[0] + 0.36, start[1]), (end[0] - 0.36, end[1])
    middle = (x0 + x1) / 2
    curve = Path([(x0, y0), (middle, y0), (middle, y1), (x1, y1)], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    look = {"edgecolor": RULE, "linewidth": 0.7} if node.state == DROPPED else {"edgecolor": SOFT, "linewidth": 1.0}
    if node.chosen:
        look = {"edgecolor": INK, "linewidth": 2.0}
    axes.add_patch(PathPatch(curve, facecolor="none", **look))


def _draw_node(axes: Any, x: float, y: float, node: Node, label: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.08"
    weight = 2.0 if node.chosen else 1.0
    axes.add_patch(
        FancyBboxPatch((x - 0.36, y - 0.4), 0.72, 0.8, boxstyle=shape, linewidth=weight, **_LOOKS[node.state])
    )
    color = SOFT if node.state == DROPPED else INK
    text = {"ha": "center", "color": color, "parse_math": False}
    bold = "bold" if node.chosen else "normal"
    if node.parent is None:
        axes.text(x, y, shown(label, 11), va="center", fontsize=8, fontweight=bold, **text)
        return
    value = f"{node.log_prob:.2f}" if node.score is None else f"score {node.score:.2f}"
    axes.text(x, y - 0.14, shown(label, 11), va="center", fontsize=8, fontweight=bold, **text)
    axes.text(x, y + 0.23, value.replace("-", "−"), va="center", fontsize=6, **text)


def _draw_key(axes: Any, dropped: bool) -> None:
    from matplotlib.patches import Rectangle

    for place, state in enumerate((KEPT, FINISHED, DROPPED)[: 3 if dropped else 2]):
        x = -0.53 + 0.8 * place
        axes.add_patch(Rectangle((x, -1.18), 0.12, 0.3, linewidth=1.0, **_LOOKS[state]))
        axes.text(x + 0.17, -1.03, state, ha="left", va="center", fontsize=7, color=SOFT)


def _in_words(tree: BeamTree, name: Any) -> str:
    ended = [f"{' '.join(name(node.tokens()))} ({node.score:.2f})" for node in tree.finished()]
    counts = ", ".join(f"{len(tree.nodes(state))} {state}" for state in (KEPT, FINISHED, DROPPED))
    return (
        f"Beam search of {len(tree.steps) - 1} steps: {counts}. Finished, the best first: {'; '.join(ended) or 'none'}"
    )
