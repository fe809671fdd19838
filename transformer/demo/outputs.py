"""What a model expects after each token of a translation, beside what comes: the tutorial's one-hot targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_transformer.decoding import evaluating
from fused_transformer.demo.phrases import Sentence
from fused_transformer.model import Transformer
from fused_transformer.tokenizer import EOS, Tokenizer


class Outputs(NamedTuple):
    """Of the L steps of a sentence's translation, eos included.

    targets: (L,) int64, the token that comes; as a distribution it is one-hot.
    before, after: (L, V) float32, the untrained and the trained model's distributions, each given all tokens ahead.
    """

    sentence: Sentence
    targets: Tensor
    before: Tensor
    after: Tensor

    def table(self, tokenizer: Tokenizer) -> str:
        """Lines of text: for each step the target, and both models' probabilities of this translation's tokens."""
        columns = list(dict.fromkeys(self.targets.tolist()))
        names = [word or "<eos>" for word in tokenizer.decode([[token] for token in columns])]
        width = max(len("others"), *map(len, names))
        label = max(map(len, ("untrained", *names)))
        lines = [f"{'':{label + 10}}  " + "  ".join(f"{name:>{width}}" for name in (*names, "others"))]
        for step, token in enumerate(self.targets.tolist()):
            target = torch.zeros(self.before.shape[1])
            target[token] = 1.0
            rows = (("target", target), ("untrained", self.before[step]), ("trained", self.after[step]))
            for name, distribution in rows:
                shown = distribution[columns]
                numbers = [*shown.tolist(), max(0.0, 1.0 - float(shown.sum()))]
                head = names[columns.index(token)] if name == "target" else ""
                lines.append(f"{head:>{label}} {name:9}  " + "  ".join(f"{x:{width}.2f}" for x in numbers))
        return "\n".join(lines)


@torch.no_grad()
def distributions(model: Transformer, tokenizer: Tokenizer, sentence: Sentence) -> tuple[Tensor, Tensor]:
    """The tokens of the translation (L,), eos included, and the model's distribution (L, V) at each of them."""
    source, target = tokenizer.encode([sentence.source, sentence.target])
    expected = torch.tensor([*target, EOS])
    given = torch.tensor([[model.config.bos_idx, *target]])
    with evaluating(model):
        logits = model(torch.tensor([[*source, EOS]]), given)
    return expected, logits[0].float().softmax(-1)
