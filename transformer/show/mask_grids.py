"""What masks let through: each of them, and all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_transformer.kernels import attention_weights, attention_with_lse
from fused_transformer.kernels.attention import Causal
from fused_transformer.show.picture import SOFT, Picture, name_ticks, panels

_MOST_SEQUENCES = 8


def allowed(length: int, keys: int, **masks: Any) -> Tensor:
    """(B, H, L, S) bool: which keys each query may attend to, as the attention op itself has it.

        allowed = attention_weights(0, 0) > 0        of queries and keys that are 0, under the masks

    Args:
        length, keys: L and S.
        masks: keep, bias, causal, window and k_lengths, as `kernels.attention` takes them (of the bias -inf alone
            masks). B and H are the largest that they have.

    Raises:
        ValueError: they do not fit.
    """
    if length < 1 or keys < 1:
        raise ValueError(f"length and keys must be at least 1, got {length} and {keys}")
    given = {name: mask for name, mask in masks.items() if mask is not None}
    batch = [len(given["k_lengths"])] if "k_lengths" in given else []
    heads = [1]
    for name in ("keep", "bias"):
        if name in given:
            shape = (1,) * (4 - given[name].dim()) + tuple(given[name].shape)
            batch.append(shape[0])
            heads.append(shape[1])
    if "bias" in given:
        given["bias"] = torch.where(given["bias"] == -torch.inf, -torch.inf, 0.0)
    given = {name: mask.cpu() if isinstance(mask, Tensor) else mask for name, mask in given.items()}
    q, k = (torch.zeros(max(batch, default=1), max(heads), n, 1) for n in (length, keys))
    with torch.no_grad():
        _, lse = attention_with_lse(q, k, k, **given)
        return attention_weights(q, k, lse, **given) > 0


def masks(
    length: int,
    keys: int | None = None,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    k_lengths: Tensor | Sequence[int] | None = None,
    head: int = 0,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
) -> Picture:
    """Which keys (across) each query (down) may attend to: under each mask alone, and under all of them together.

        show.masks(8, causal="top_left", window=(3, 0), k_lengths=[8, 5])

    The op itself is asked: see `allowed`. A query that may attend to nothing is marked: its output is 0.

    Args:
        length: L. keys: S; None: L.
        keep, bias, causal, window, k_lengths: as `kernels.attention` takes them; -inf in a bias masks.
        head: which, where masks differ by head.
        query_labels, key_labels: L and S labels; None: numbers.

    Where masks differ by sequence, there is a row of pictures for each of the first 8.

    Raises:
        ValueError: a mask does not fit L and S, there is no such head, or labels are too many or too few.
        ModuleNotFoundError: matplotlib is not installed.
    """
    keys = length if keys is None else keys
    lengths = torch.tensor(k_lengths) if k_lengths is not None and not isinstance(k_lengths, Tensor) else k_lengths
    given = {"keep": keep, "bias": bias, "causal": causal or None, "window": window, "k_lengths": lengths}
    given = {name: mask for name, mask in given.items() if mask is not None}
    alone = {
        _named(name, mask): allowed(length, keys, **_with_corner(name, mask, given)) for name, mask in given.items()
    }
    together = allowed(length, keys, **given)
    if not 0 <= head < together.shape[1]:
        raise ValueError(f"head must be between 0 and {together.shape[1] - 1}, got {head}")
    labels = [_labels("query_labels", query_labels, length), _labels("key_labels", key_labels, keys)]
    every = (alone if len(alone) > 1 else {}) | {_all(alone): together}
    sequences = min(len(together), _MOST_SEQUENCES)
    cell = 0.24 if max(length, keys) <= 24 else 4.5 / max(length, keys)
    figure, axes = panels(sequences, len(every), max(cell * keys, 1.2) + 0.55, max(cell * length, 1.0) + 0.6)
    for sequence, line in enumerate(axes):
        for one, (name, mask) in zip(line, every.items(), strict=True):
            picture = mask[min(sequence, len(mask) - 1), min(head, mask.shape[1] - 1)]
            _draw(one, picture, labels)
            if sequence == 0:
                one.set_title(name, fontsize=8, loc="left")
        line[0].set_ylabel("query" if len(together) == 1 else f"sequence {sequence}, query", fontsize=8, color=SOFT)
    for one in axes[-1]:
        one.set_xlabel("key", fontsize=8, color=SOFT)
    figure.subplots_adjust(wspace=0.25, hspace=0.3)
    pairs, blind = int(together.sum()), int((~together.any(-1)).sum())
    words = f"{pairs} of {together.numel()} pairs of query and key may attend; {blind} queries to nothing"
    return Picture(figure, "Masks", f"{_all(alone)}: {words}")


def _with_corner(name: str, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A mask alone. A window moves with `causal` and with the lengths, where these put the diagonal's end."""
    if name == "window" and given.get("causal") == "bottom_right":
        # Without the causal limit itself there is no way to say so; what it lets through is part of the picture.
        return {other: given[other] for other in ("causal", "window", "k_lengths") if other in given}
    if name == "causal" and mask == "bottom_right" and "k_lengths" in given:
        return {"causal": mask, "k_lengths": given["k_lengths"]}
    return {name: mask}


def _named(name: str, mask: Any) -> str:
    return name if isinstance(mask, Tensor) else f"{name}={mask!r}"


def _all(alone: dict[str, Tensor]) -> str:
    if not alone:
        return "no mask"
    return next(iter(alone)) if len(alone) == 1 else "all together"


def _labels(name: str, labels: Sequence[str] | None, count: int) -> list[str]:
    if labels is None:
        step = 1 if count <= 24 else 8
        return [str(i) if i % step == 0 else "" for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"{name} must be {count}, got {len(labels)}")
    return list(labels)


def _draw(axes: Any, mask: Tensor, labels: list[list[str]]) -> None:
    from matplotlib.colors import ListedColormap

    # 0: masked, 1: attends, 2: masked in a row that attends to nothing
    levels = mask.long() + 2 * (~mask.any(-1, keepdim=True)).long()
    axes.imshow(levels.tolist(), cmap=ListedColormap(["#eceff3", "#0072b2", "#f7d3bf"]), vmin=0, vmax=2, aspect="auto")
    name_ticks(axes.yaxis, labels[0], fontsize=6)
    name_ticks(axes.xaxis, labels[1], fontsize=6, rotation=90 if max(map(len, labels[1])) > 2 else 0)
    axes.tick_params(length=0)
    if max(mask.shape) <= 48:
        for count, line in ((mask.shape[0], axes.axhline), (mask.shape[1], axes.axvline)):
            for i in range(count - 1):
                line(i + 0.5, color="white", linewidth=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
