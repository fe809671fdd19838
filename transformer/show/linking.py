"""Heads that make the same link in several sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_transformer.maps import AttentionMaps
from fused_transformer.show.heads_page import heads, number_of

Link = tuple[AttentionMaps, "int | str", "int | str"]


class LinkingHead(NamedTuple):
    """A head, and the weight that it gives each of the links that were asked for."""

    layer: int
    head: int
    weights: tuple[float, ...]


def linking_heads(links: Sequence[Link], *, attention: str = "encoder_self") -> list[LinkingHead]:
    """Every head, by how well it makes all of some links: the one whose weakest link is strongest comes first.

        best, *_ = show.linking_heads([(tired, "it", "animal"), (wide, "it", "street")])

    Args:
        links: maps, and a query and a key of theirs, as numbers or as labels (the first such token).
        attention: the kind, as `show.heads` takes it, but for "all".

    Raises:
        ValueError: there are no links, no such attention, query or key, or the maps are not of one model.
    """
    if not links:
        raise ValueError("linking_heads needs one link at least")
    found = []
    for maps, query, key in links:
        view = heads(maps, attention=attention, token=query)
        weights = maps.weights(view.kind)  # which there are none of "all"
        found.append(weights[:, :, view.token, number_of([*maps.columns(view.kind)], key, "keys")])
    if len({one.shape for one in found}) > 1:
        raise ValueError(f"maps of one model have as many layers and heads, got {[tuple(x.shape) for x in found]}")
    all_of_them = torch.stack(found)
    count = all_of_them.shape[2]
    order = all_of_them.amin(0).flatten().argsort(descending=True, stable=True).tolist()
    return [
        LinkingHead(place // count, place % count, tuple(all_of_them[:, place // count, place % count].tolist()))
        for place in order
    ]
