"""Whose logits a search with tokens forbidden writes to; what it forbids is in test_search.py."""

from __future__ import annotations

import torch

from fused_transformer.constraints import constrain
from fused_transformer.search import SearchOptions


def test_logits_are_written_to_only_where_they_are_given_away():
    rows, options = torch.zeros(3, 5), SearchOptions(suppress_tokens=(1,))

    class Giving:
        gives_its_logits = False

        def __call__(self, prefixes, sentences, parents):
            return rows

    prefixes, numbers = torch.ones(3, 1, dtype=torch.int64), torch.arange(3)
    logits = constrain(lambda prefixes, sentences, parents: rows, options)(prefixes, numbers, numbers)
    assert torch.equal(rows, torch.zeros(3, 5)) and logits[:, 1].isneginf().all()
    assert constrain(Giving(), options)(prefixes, numbers, numbers) is not rows
    assert torch.equal(rows, torch.zeros(3, 5))
    Giving.gives_its_logits = True
    assert constrain(Giving(), options)(prefixes, numbers, numbers) is rows and rows[:, 1].isneginf().all()
