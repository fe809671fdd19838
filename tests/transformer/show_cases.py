"""Attention maps that the tests of pages and figures share."""

from __future__ import annotations

import torch

from fused_transformer import AttentionMaps

ENGLISH = ("The", "animal", "didn't", "cross", "it", "</s>")
FRENCH = ("<s>", "L'", "animal", "ne", "l'a", "</s>")
# What could end a script or an attribute, be taken for markup, a formula or a template's name, or be seen wrongly.
ODD = (
    *("<script>alert(1)</script>", "</script>", "<!--", "]]>", "&amp;", "\"'`", "<img src=x onerror=alert(1)>"),
    *("🦊", "👩‍👩‍👧", "שלום", "مرحبا", "日本語", "a\u202eb", "\u2028", "", "  ", "\n", "\x00", "\ud83d"),
    *("$\\alpha$", "${title}", "$data", "{title}", "%s", "x" * 90, "▁it"),
)


def softmaxes(*shape: int, causal: bool = False) -> torch.Tensor:
    scores = torch.randn(*shape) * 3
    if causal:
        scores = scores.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


def made_up(source=ENGLISH, target=FRENCH, layers: int = 2, heads: int = 3) -> AttentionMaps:
    """Maps with random weights."""
    rows, steps = len(source), len(target) - 1
    return AttentionMaps(
        source,
        target,
        softmaxes(layers, heads, rows, rows),
        softmaxes(layers, heads, steps, rows),
        softmaxes(layers, heads, steps, steps, causal=True),
    )
