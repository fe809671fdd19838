"""How many tokens one step of a trained model gives where decoding looks ahead (`fused_transformer.lookahead`).

    python -m bench.ahead --model DIR --source FILE [--sentences 100]

The model is what `python -m fused_transformer train` wrote. Sentences are translated one by one, greedily and with 4
beams, and steps are counted: how many tokens the search went, and how often the model and its int8 draft were asked.
Nothing is timed here, that is `bench.ctranslate2`'s part, with random weights; how often a draft is right depends on
what a model has learnt. The model may be as small as it likes: it looks ahead here whatever its size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_transformer import PackedTransformer, SearchOptions, generate, inference
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.guessing import levels_for
from fused_transformer.text import read_lines

BEAMS = (1, 4)


class Counting(PackedTransformer):
    """Counts the steps of the model and of its draft."""

    steps = drafts = 0

    def step_ahead(self, *arguments, levels, **options):
        self.steps += 1
        self.drafts += levels
        return super().step_ahead(*arguments, levels=levels, **options)


def count(model: Counting, sources: Sequence[list[int]], beam_size: int) -> dict:
    """Tokens that a search goes, and steps that it takes."""
    model.steps = model.drafts = tokens = 0
    options = SearchOptions(beam_size=beam_size)
    for source in sources:
        searched: list = []
        told = {"on_step": searched.append} if beam_size > 1 else {}
        found = generate(model, torch.tensor([source]), options=options, **told)
        tokens += len(searched) or int(found.lengths + found.finished)
    return {
        "beam_size": beam_size,
        "tokens": tokens,
        "steps": model.steps,
        "drafts": model.drafts,
        "tokens_per_step": round(tokens / model.steps, 2),
        "most": 1 + levels_for(1, beam_size),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint, or the folder that train wrote")
    parser.add_argument("--source", required=True, help="text to translate, a sentence a line")
    parser.add_argument("--sentences", type=int, default=100, help="how many lines of it")
    parsed = parser.parse_args(arguments)
    model, tokenizer, _, _ = load_checkpoint(find_checkpoint(parsed.model))
    inference.LEAST_SCREENED = 1  # smaller models read their weights from the cache: there nothing is gained
    packed = Counting(model.eval())
    lines = read_lines(parsed.source)[: parsed.sentences]
    sources = [[*tokens, model.config.eos_idx] for tokens in tokenizer.encode(lines) if tokens]
    if not sources:
        parser.error(f"{parsed.source} holds no text")
    for beam_size in BEAMS:
        row = count(packed, sources, beam_size)
        sys.stdout.write(
            f"beam size {beam_size}: {row['tokens']} tokens in {row['steps']} steps of the model, "
            f"{row['tokens_per_step']} a step of at most {row['most']}, and {row['drafts']} of the draft\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
