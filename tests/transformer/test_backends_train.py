"""A whole training step on one backend: every op of the model, forward and backward, on real sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fused_transformer import Transformer
from fused_transformer.batches import Corpus
from fused_transformer.kernels import use_backend
from fused_transformer.settings import PRESETS, model_config, training_options
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer
from tests.inputs import running_on

# Real French-English sentences; not this project's to ship, so they lie beside the checkout or not at all.
MULTI30K = Path(__file__).resolve().parents[3] / "shared" / "data" / "multi30k"
STEPS, PAIRS = 3, 2000

pytestmark = pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"no Multi30k in {MULTI30K.name} beside the checkout")


def first_lines(name: str) -> list[str]:
    with (MULTI30K / name).open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line, _ in zip(file, range(PAIRS), strict=False)]


@pytest.fixture(scope="module")
def corpus() -> tuple[Corpus, int]:
    source, target = first_lines("train.fr"), first_lines("train.en")
    tokenizer = Tokenizer.learn(source + target, 1000)
    return Corpus(tokenizer.encode(source), tokenizer.encode(target)), len(tokenizer)


def losses(corpus: Corpus, vocabulary: int, device: str) -> list[float]:
    """Of the first steps of the smallest preset, dropout and all; the steps change the weights in between."""
    settings = {**PRESETS["tiny"], "max_tokens": 256, "dropout": 0.1}
    torch.manual_seed(7)
    model = Transformer(model_config(settings, vocabulary)).to(device)
    trainer = Trainer(model, corpus, training_options(settings))
    torch.manual_seed(8)
    return [trainer.train_step() for _ in range(STEPS)]


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_the_first_steps_have_the_losses_of_the_reference(backend, corpus, device):
    with use_backend("reference"):
        expected = losses(*corpus, device)
    with running_on(backend):
        got = losses(*corpus, device)
    assert got == pytest.approx(expected, rel=2e-5)
    assert got[0] != got[-1]
