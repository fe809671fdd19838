"""What a model says the next token is, step by step, beside what it should have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_transformer.decoding import evaluating
from fused_transformer.model import Transformer
from fused_transformer.show.picture import SOFT, Picture, name_ticks, panels

_NUMBERED = 14  # columns up to which each cell has its number written in it


@torch.no_grad()
def output_distributions(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    """(T, V) float32: the probability of every token at each step, given the target up to there.

        p = softmax(model(source, target[:-1]))        in evaluation mode

    Args:
        model: left in the mode it was in.
        source: (S,) int64, one sentence.
        target: (T + 1,) int64, from bos to eos: p[i] is for target[i + 1].

    Raises:
        TypeError, ValueError: model is no Transformer, or source or target has the wrong shape.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"distributions are of a Transformer, got {type(model).__name__}")
    if source.dim() != 1 or target.dim() != 1 or not len(source) or len(target) < 2:
        raise ValueError(
            "source and target must be one sentence each, the target of two tokens at least, "
            f"got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    with evaluating(model):
        return model(source[None], target[None, :-1])[0].softmax(-1, dtype=torch.float32)


def distributions(
    outputs: Tensor | Mapping[str, Tensor],
    target: Tensor | Sequence[int],
    *,
    labels: Mapping[int, str] | Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    most: int = 12,
) -> Picture:
    """The target's one-hot rows beside a model's output distributions: a row for each step, a column for each token.

        before, after = (output_distributions(model, source, target) for model in (untrained, trained))
        show.distributions({"untrained": before, "trained": after}, target[1:])

    Args:
        outputs: (T, V), each row a distribution; or several by name.
        target: T token numbers, what each step should have said, without bos.
        labels: from a token's number to its label; None: the number.
        tokens: the columns; None: the target's tokens, and those that an output finds likeliest.
        most: columns at most, where `tokens` is None.

    Raises:
        ValueError: shapes do not fit, or a token is not in the vocabulary.
        ModuleNotFoundError: matplotlib is not installed.
    """
    named = dict(outputs) if isinstance(outputs, Mapping) else {"output": outputs}
    steps = [int(token) for token in target]
    for name, output in named.items():
        if output.dim() != 2 or len(output) != len(steps) or not steps:
            raise ValueError(
                f"{name} must be ({len(steps)}, V) for a target of {len(steps)} tokens, got {tuple(output.shape)}"
            )
    sizes = {output.shape[1] for output in named.values()}
    if len(sizes) != 1:
        raise ValueError(f"the outputs must have one vocabulary, got sizes {sorted(sizes)}")
    (vocabulary,) = sizes
    columns = _columns(named, steps, most) if tokens is None else [int(token) for token in tokens]
    for token in (*steps, *columns):
        if not 0 <= token < vocabulary:
            raise ValueError(f"there is no token {token} in a vocabulary of {vocabulary}")

    wanted = torch.nn.functional.one_hot(torch.tensor(steps), vocabulary).float()
    everything = {"target": wanted} | {name: output.detach().float().cpu() for name, output in named.items()}
    labelled = {token: str(token) if labels is None else labels[token] for token in {*steps, *columns}}
    cell = 0.42 if len(columns) <= _NUMBERED else 0.26
    height = 0.34 * len(steps) + 0.7
    figure, axes = panels(1, len(everything), cell * len(columns) + 1.0, height)
    for one, (name, values) in zip(axes[0], everything.items(), strict=True):
        cells = values[:, columns].tolist()
        one.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        one.set_title(name, fontsize=9, loc="left")
        one.tick_params(length=0, labelsize=8)
        name_ticks(one.xaxis, [labelled[token] for token in columns], rotation=60, ha="right", rotation_mode="anchor")
        name_ticks(one.yaxis, [labelled[token] for token in steps] if one is axes[0][0] else [""] * len(steps))
        if len(columns) <= _NUMBERED:
            _write_numbers(one, cells)
    axes[0][0].set_ylabel("step, by its target", fontsize=8, color=SOFT)
    figure.subplots_adjust(wspace=0.08)
    return Picture(figure, "Output distributions", _in_words(everything, steps, labelled, labels))


def _columns(named: Mapping[str, Tensor], steps: list[int], most: int) -> list[int]:
    """The target's tokens in their order, then those that some step of some output gives the most probability."""
    columns = list(dict.fromkeys(steps))
    highest = torch.stack([output.detach().float().cpu().amax(0) for output in named.values()]).amax(0)
    for token in highest.argsort(descending=True, stable=True).tolist():
        if len(columns) >= most:
            break
        if token not in columns:
            columns.append(token)
    return columns


def _write_numbers(axes, cells: list[list[float]]) -> None:
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            if value >= 0.005:
                color = "white" if value > 0.55 else SOFT
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=color)


def _in_words(everything: dict[str, Tensor], steps: list[int], labelled: dict[int, str], labels) -> str:
    said = []
    for name, values in everything.items():
        if name != "target":
            mean = sum(float(values[i, token]) for i, token in enumerate(steps)) / len(steps)
            said.append(f"{name} gives the right token {mean:.0%} on average")
    return f"Distributions over {len(steps)} steps ({' '.join(labelled[token] for token in steps)}): {'; '.join(said)}"
