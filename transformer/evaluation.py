"""How good a model is: loss per token, and BLEU of its translations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import sacrebleu
import torch

from fused_transformer.batches import Corpus, cut_by_tokens
from fused_transformer.model import Transformer
from fused_transformer.training import mean_loss
from fused_transformer.translation import Translator


class Bleu(NamedTuple):
    """score: BLEU from 0 to 100; signature: sacreBLEU's line that says how it was computed."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """sacreBLEU with its defaults (13a tokens, case matters) of translations against one reference each.

    Raises:
        ValueError: their numbers differ.

    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"there must be a reference for each of {len(hypotheses)} hypotheses, got {len(references)}")
    metric = sacrebleu.metrics.BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Bleu(score, str(metric.get_signature()))


class Validation:
    """Held-out sentence pairs to measure a model on, over and over.

    Args:
        corpus: the pairs as tokens, for the loss (all of them).
        source, target: as text, for BLEU (the first `sentences` of them, translated greedily).
        sentences: how many are translated.
        max_tokens: of a batch.
    """

    def __init__(
        self, corpus: Corpus, source: Sequence[str], target: Sequence[str], *, sentences: int, max_tokens: int
    ) -> None:
        self.corpus, self.max_tokens = corpus, max_tokens
        self.source, self.target = source[:sentences], target[:sentences]
        lengths = torch.stack([corpus.source.lengths, corpus.target.lengths], 1)
        order = lengths[:, 1].argsort(stable=True)
        self.batches = cut_by_tokens(order, lengths, max(max_tokens, int(lengths.max())))

    def measure(self, translator: Translator, on_batch: Callable[[int], object]) -> tuple[float, float]:
        """Loss per target token (without label smoothing) of all pairs, and BLEU of the greedy translations.

        Args:
            on_batch: called after each translated batch; may raise to break off.
        """
        loss = mean_loss(cast(Transformer, translator.model), self.corpus, self.batches)
        translations = translator.translate(self.source, beam_size=1, max_tokens=self.max_tokens, on_batch=on_batch)
        return loss, bleu([best.text for best, *_ in translations], self.target).score
