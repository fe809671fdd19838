"""Translates lines of text with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fused_transformer.batches import Ragged, cut_by_tokens
from fused_transformer.checkpoint import find_checkpoint, load_checkpoint
from fused_transformer.decoding import beam_search
from fused_transformer.model import Transformer
from fused_transformer.tokenizer import Tokenizer


class Translation(NamedTuple):
    """One translation of a line, and the score that ranked it (higher is better)."""

    text: str
    score: float


class Translator:
    """A model and its tokenizer, from text to text.

    Args:
        model: a Transformer; it is translated with where it is.
        tokenizer: the model's.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Translator:
        """From a checkpoint file, or from the folder that `train` wrote (its best checkpoint).

        Raises:
            FileNotFoundError, ValueError: there is no whole checkpoint.
        """
        model, tokenizer, _, _ = load_checkpoint(find_checkpoint(path))
        return cls(model.to(device).eval(), tokenizer)

    def translate(
        self,
        lines: Sequence[str],
        *,
        beam_size: int = 4,
        top_beams: int = 1,
        length_penalty: float = 0.6,
        max_tokens: int = 2048,
        on_batch: Callable[[int], object] = lambda sentences: None,
    ) -> list[list[Translation]]:
        """The best top_beams translations of each line, best first, in the order of the lines.

        Sentences of similar length are translated together. A line without a word is its own translation.

        Args:
            lines: the text, a sentence each.
            beam_size, top_beams, length_penalty: see `beam_search`; beam_size 1 is greedy.
            max_tokens: most source tokens of a batch, padding included and beams not counted; raised to the
                longest sentence.
            on_batch: called after each batch with its number of sentences.

        Returns:
            For each line its translations: fewer than top_beams where the search found no more.

        Raises:
            ValueError: an option is out of its range.
        """
        results: list[list[Translation]] = [[Translation("", 0.0)] for _ in lines]
        written = [i for i, line in enumerate(lines) if line.strip()]
        eos = self.model.config.eos_idx
        source = Ragged([[*tokens, eos] for tokens in self.tokenizer.encode([lines[i] for i in written])])
        limit = max(max_tokens, int(source.lengths.max()) if written else 0)
        order = source.lengths.argsort(descending=True, stable=True)  # what needs the most memory comes first
        device = next(self.model.parameters()).device
        for rows in cut_by_tokens(order, source.lengths[:, None], limit):
            found = beam_search(
                self.model,
                source.padded(rows, self.model.config.padding_idx).to(device),
                source.lengths[rows].to(device),
                beam_size=beam_size,
                top_beams=top_beams,
                length_penalty=length_penalty,
            )
            for row, beams, scores in zip(rows.tolist(), found.tolist(), found.scores.tolist(), strict=True):
                texts = map(_one_line, self.tokenizer.decode(beams))
                ranked = map(Translation, texts, scores)
                results[written[row]] = [one for one in ranked if one.score > float("-inf")]
            on_batch(len(rows))
        return results


def _one_line(text: str) -> str:
    # The vocabulary can spell any byte; a line break would shift every line after it.
    return text.replace("\r", " ").replace("\n", " ")
