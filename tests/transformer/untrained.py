"""A translator that has learned nothing, but translates all the same: differently for different text and options."""

from __future__ import annotations

import torch

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.translation import Translator
from tests.transformer.texts import parallel_lines


def untrained() -> Translator:
    """The same one every time, with a vocabulary of the made-up text."""
    source, target = parallel_lines(200)
    tokenizer = Tokenizer.learn(source + target, 320)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = TransformerConfig(
            source_vocab_size=len(tokenizer), d_model=16, num_heads=2, d_feedforward=32,
            num_encoder_layers=1, num_decoder_layers=1,
        )  # fmt: skip
        model = Transformer(config).eval()
    with torch.no_grad():
        model.source_embedding.weight *= 3  # far from uniform
    return Translator(model, tokenizer)
