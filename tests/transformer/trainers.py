"""A tiny model, made-up pairs of token numbers and a trainer of both, equal in every process."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.batches import Corpus
from fused_transformer.training import Trainer, TrainingOptions

VOCABULARY = 40
OPTIONS: dict[str, Any] = {"max_tokens": 60, "warmup_steps": 20, "accumulate": 4}


def random_corpus(pairs: int = 90, lines: list[int] | None = None) -> Corpus:
    """Pairs of 1 to 12 tokens, the target the source's numbers in reverse."""
    choose = random.Random(7)
    source = [choose.choices(range(3, VOCABULARY), k=choose.randint(1, 12)) for _ in range(pairs)]
    return Corpus(source, [line[::-1] for line in source], lines=lines)


def tiny_trainer(
    *, dropout: float = 0.1, corpus: Corpus | None = None, model: dict | None = None, **options
) -> Trainer:
    """Of one layer each, 16 wide; options of `TrainingOptions`, of `Trainer`, and `model`, of `TransformerConfig`."""
    sizes = {"d_model": 16, "num_heads": 2, "d_feedforward": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    torch.manual_seed(5)
    network = Transformer(
        TransformerConfig(source_vocab_size=VOCABULARY, dropout=dropout, **{**sizes, **(model or {})})
    )
    own = {name: options.pop(name) for name in ("processes", "compile", "checkpoint_activations") if name in options}
    return Trainer(network, corpus or random_corpus(), TrainingOptions(**{**OPTIONS, **options}), **own)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def determined(values: dict) -> dict:
    """Without the keys' biases: softmax does not see them, so their gradient is rounding, which Adam makes steps of."""
    d_model = 16
    return {
        name: torch.cat([x[:d_model], x[2 * d_model :]]) if name.endswith("in_proj_bias") else x
        for name, x in values.items()
    }
