"""A small model that learns a little English and French in a minute, from sentences made here: no data is needed.

result = fused_transformer.demo.run()
result.translator.translate(["The animal didn't cross the street because it was too wide"])
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_transformer.batches import Corpus
from fused_transformer.checkpoint import BEST, save_checkpoint
from fused_transformer.config import TransformerConfig
from fused_transformer.demo.corpus import Text, make_text
from fused_transformer.demo.grammar import STUDENT, TIRED, TUTORIAL, WIDE
from fused_transformer.demo.outputs import Outputs, distributions
from fused_transformer.demo.phrases import Sentence
from fused_transformer.model import Transformer
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer, TrainingOptions
from fused_transformer.translation import Translator

__all__ = ["STUDENT", "TIRED", "TUTORIAL", "WIDE", "DemoResult", "Outputs", "Score", "Sentence", "Text", "run"]

STEPS = 1200
VOCABULARY = 2000  # at most; the text has fewer words
MODEL: dict[str, Any] = {
    "d_model": 64,
    "num_heads": 2,
    "d_feedforward": 8,
    "num_encoder_layers": 3,
    "num_decoder_layers": 1,
    "norm_first": True,
}
TRAINING: dict[str, Any] = {
    "max_tokens": 1024,
    "warmup_steps": 200,
    "learning_rate_factor": 0.8,
    # Pools no larger than a batch: sorted by length, a batch would be of one kind of sentence alone, and the model
    # forgets the others over it.
    "pool_size": 100,
}


class Score(NamedTuple):
    """Held-out sentences of one kind. wrong: those whose translation is not the expected one, and the translation."""

    total: int
    wrong: list[tuple[Sentence, str]]

    @property
    def right(self) -> int:
        return self.total - len(self.wrong)


@dataclass(frozen=True)
class DemoResult:
    """What `run` leaves.

    Attributes:
        seed: of everything random.
        model, tokenizer, translator: the trained model, in evaluation mode, and what translates with it.
        text: the sentences it was trained on, and the held-out ones.
        steps, seconds: of the training. finished: it was not cut short by its time.
        outputs: of "je suis étudiant": the targets, and the distributions before and after training.
        scores: of the held-out sentences by kind: "plain", "it", "rivals", "wanted", "people".
        tutorial: the translations of the tutorial's three sentences, which are held out too.
    """

    seed: int
    model: Transformer
    tokenizer: Tokenizer
    translator: Translator
    text: Text
    steps: int
    seconds: float
    finished: bool
    outputs: Outputs
    scores: dict[str, Score]
    tutorial: list[tuple[Sentence, str]]

    @property
    def accuracy(self) -> float:
        """The share of all held-out sentences that are translated word for word as expected."""
        return sum(score.right for score in self.scores.values()) / sum(score.total for score in self.scores.values())

    def save(self, folder: str | Path) -> Path:
        """Write the model and its vocabulary to `folder` as a checkpoint for `translate` and `show`; the file's path.

        Raises:
            OSError: it could not be written.
        """
        path = Path(folder) / BEST
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, self.model, self.tokenizer)
        return path


def run(
    seed: int = 1,
    *,
    steps: int = STEPS,
    minutes: float | None = None,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> DemoResult:
    """Train a small Transformer (`MODEL`) on the demo's sentences; then translate the held-out ones.

    Args:
        seed: of the sentences, the weights, dropout and the order. The same seed and number of threads on the same
            machine give the same model; the caller's random numbers are left as they were.
        steps: of training.
        minutes: the training ends after so many, if `steps` are not done by then.
        on_step: called after each step with its number and loss.

    Raises:
        ValueError: steps is below 1, or minutes not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    text = make_text(seed)
    source, target = [one.source for one in text.training], [one.target for one in text.training]
    tokenizer = Tokenizer.learn([*source, *target], VOCABULARY, algorithm="word", character_coverage=1.0)
    corpus = Corpus(tokenizer.encode(source), tokenizer.encode(target))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(source_vocab_size=len(tokenizer), **MODEL))
        _, before = distributions(model, tokenizer, STUDENT)
        trainer = Trainer(model, corpus, TrainingOptions(seed=seed, **TRAINING))
        begun = time.monotonic()
        while trainer.step < steps and (minutes is None or time.monotonic() - begun < 60 * minutes):
            loss = trainer.train_step()
            on_step(trainer.step, loss)
        seconds = time.monotonic() - begun
    model.eval()
    targets, after = distributions(model, tokenizer, STUDENT)
    translator = Translator(model, tokenizer)
    scores = {kind: _score(translator, sentences) for kind, sentences in text.held_out.items()}
    tutorial = list(zip(TUTORIAL, _translations(translator, TUTORIAL), strict=True))
    finished = trainer.step == steps
    outputs = Outputs(STUDENT, targets, before, after)
    return DemoResult(
        seed, model, tokenizer, translator, text, trainer.step, seconds, finished, outputs, scores, tutorial
    )


def _translations(translator: Translator, sentences: list[Sentence] | tuple[Sentence, ...]) -> list[str]:
    lines = translator.translate([one.source for one in sentences], beam_size=4)
    return [best.text for best, *_ in lines]


def _score(translator: Translator, sentences: list[Sentence]) -> Score:
    pairs = zip(sentences, _translations(translator, sentences), strict=True)
    return Score(len(sentences), [(one, text) for one, text in pairs if text != one.target])
