"""What a training is made of, as one flat table: the options of `train`, the presets, and what a checkpoint keeps."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from typing import Any

from fused_transformer.config import TransformerConfig
from fused_transformer.training_options import PRECISIONS, TrainingOptions

Settings = dict[str, Any]

# name: (type, what it is)
MODEL = {
    "d_model": (int, "width of the model"),
    "num_heads": (int, "attention heads; must divide the width"),
    "d_feedforward": (int, "width of the feed-forward networks"),
    "num_encoder_layers": (int, "layers of the encoder"),
    "num_decoder_layers": (int, "layers of the decoder"),
    "dropout": (float, "of the embeddings and of each sublayer's output"),
    "attention_dropout": (float, "of the attention weights"),
    "activation_dropout": (float, "of the feed-forward activations"),
    "norm_first": (int, "1: LayerNorm ahead of each sublayer; 0: after it, as in the paper"),
}
TEXT = {
    "vocab_size": (int, "most subwords, shared by source and target"),
    "algorithm": (str, "bpe, unigram or word"),
    "max_length": (int, "pairs with more subwords on a side are left out"),
}
TRAINING = {
    "max_tokens": (int, "of a batch on each side, padding included"),
    "accumulate": (int, "batches that make one step, shared by all processes"),
    "warmup_steps": (int, "steps until the highest learning rate"),
    "learning_rate_factor": (float, "scales the learning rate"),
    "label_smoothing": (float, "share of the target spread over all subwords"),
    "clip_norm": (float, "longest gradient; 0: no limit"),
    "precision": (str, "what products are computed in; float16 is for GPUs"),
    "pool_size": (int, "sentence pairs sorted by length together"),
    "seed": (int, "of weights, dropout and order"),
}
GROUPS = {"model": MODEL, "text": TEXT, "training": TRAINING}

_PAPER: Settings = {
    **{name: getattr(TransformerConfig(source_vocab_size=4), name) for name in MODEL},
    "vocab_size": 37000,
    "algorithm": "bpe",
    "max_length": 256,
    **{field.name: field.default for field in fields(TrainingOptions)},
}
# "small" is for tens of thousands of pairs on a few CPU cores: small batches make the most of few epochs. "tiny" is for
# trying things out.
PRESETS: dict[str, Settings] = {
    "base": _PAPER,
    "small": {
        **_PAPER,
        "d_model": 256,
        "num_heads": 4,
        "d_feedforward": 512,
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "dropout": 0.1,
        "vocab_size": 4000,
        "max_tokens": 1024,
        "warmup_steps": 600,
        "learning_rate_factor": 0.4,
    },
    "tiny": {
        **_PAPER,
        "d_model": 64,
        "num_heads": 2,
        "d_feedforward": 128,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "vocab_size": 1000,
        "max_tokens": 1024,
        "warmup_steps": 100,
        "learning_rate_factor": 0.25,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--preset and an option for each setting, None where not given."""
    parser.add_argument("--preset", choices=PRESETS, help="where settings that are not given come from (default: base)")
    for title, table in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, (kind, what) in table.items():
            presets = ", ".join(f"{preset} {PRESETS[preset][name]}" for preset in PRESETS)
            choices = PRECISIONS if name == "precision" else None
            group.add_argument(_option(name), type=kind, choices=choices, help=f"{what} ({presets})")


def chosen(arguments: argparse.Namespace, saved: Settings | None = None) -> Settings:
    """The settings of a new training, or those of a `saved` one, which the arguments must not contradict.

    Raises:
        ValueError: an argument is infinite or no number, or differs from what the training was begun with; the message
            names each.
    """
    names = [name for table in GROUPS.values() for name in table]
    if saved is not None:  # what older checkpoints do not know was as it is by default
        saved = {**{field.name: field.default for field in fields(TrainingOptions)}, **saved}
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name, x in given.items():
        check_finite(name, x)
    if saved is None:
        return {**PRESETS[arguments.preset or "base"], **given}
    if arguments.preset:
        given = {**PRESETS[arguments.preset], **given}
    changed = [f"{_option(name)} {x} (was {saved[name]})" for name, x in given.items() if x != saved.get(name)]
    if changed:
        raise ValueError(f"a training is resumed with the settings it was begun with, but got {', '.join(changed)}")
    return saved


def model_config(settings: Settings, vocab_size: int) -> TransformerConfig:
    """The model of these settings, for one vocabulary of source and target."""
    values = {name: settings[name] for name in MODEL}
    return TransformerConfig(**{**values, "norm_first": bool(values["norm_first"])}, source_vocab_size=vocab_size)


def training_options(settings: Settings) -> TrainingOptions:
    """The training options of these settings."""
    return TrainingOptions(**{name: settings[name] for name in TRAINING})


def check_finite(name: str, value: Any) -> None:
    """ValueError for an option's value that is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{_option(name)} must be a finite number, got {value}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
