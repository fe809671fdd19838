"""Heads that make the same link in several sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_transformer.maps import AttentionMaps
from fused_transformer.show.heads_page import heads, number_of


class Link(NamedTuple):
    """A query and a key of some maps, as numbers or as labels (the first such token).

    rival: another key, that the query is not to be linked to; None: whichever there are.
    """

    maps: AttentionMaps
    query: int | str
    key: int | str
    rival: int | str | None = None


class LinkingHead(NamedTuple):
    """A head, and of each link the weight that it gives it. margins: by how much more than to the link's rival."""

    layer: int
    head: int
    weights: tuple[float, ...]
    margins: tuple[float, ...]


def linking_heads(links: Sequence[Link | tuple], *, attention: str = "encoder_self") -> list[LinkingHead]:
    """Every head, by how well it makes all of some links: the one whose smallest margin is largest comes first.

        best, *_ = show.linking_heads([(tired, "it", "animal", "street"), (wide, "it", "street", "animal")])
        margin   = weight of the key - weight of the rival, if there is one

    Args:
        links: see `Link`; of one model's maps.
        attention: the kind, as `show.heads` takes it, but for "all".

    Raises:
        ValueError: there are no links, no such attention, query or key, or the maps are not of one model.
    """
    if not links:
        raise ValueError("linking_heads needs one link at least")
    weights, margins = [], []
    for maps, query, key, rival in (Link(*link) for link in links):
        view = heads(maps, attention=attention, token=query)
        row = maps.weights(view.kind)[:, :, view.token]  # there are none of "all"
        labels = maps.columns(view.kind)
        weights.append(row[..., number_of(labels, key, "keys")])
        margins.append(weights[-1] if rival is None else weights[-1] - row[..., number_of(labels, rival, "keys")])
    if len({one.shape for one in weights}) > 1:
        raise ValueError(f"maps of one model have as many layers and heads, got {[tuple(x.shape) for x in weights]}")
    count = weights[0].shape[1]
    order = torch.stack(margins).amin(0).flatten().argsort(descending=True, stable=True).tolist()
    return [
        LinkingHead(*place, *(tuple(float(one[place]) for one in values) for values in (weights, margins)))
        for place in (divmod(number, count) for number in order)
    ]
