"""Small models and batches that the tests of the model share."""

from __future__ import annotations

import torch
from torch import nn

from fused_transformer import Transformer, TransformerConfig

VOCAB, PAD = 31, 0
TINY = {
    "source_vocab_size": VOCAB,
    "d_model": 24,
    "num_heads": 3,
    "d_feedforward": 40,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
SOURCE = torch.tensor([[5, 9, 3, 7, 6, 2], [4, 8, 2, 0, 0, 0], [30, 3, 3, 12, 2, 0]])
TARGET = torch.tensor([[1, 11, 12, 13, 4], [1, 14, 5, 0, 0], [1, 6, 30, 8, 0]])
LENGTHS = torch.tensor([6, 3, 5])
VARIANTS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "concat_t2t": {"positions": "concat_t2t", "tie_embeddings": "target", "target_vocab_size": 37},
    "concat_paper": {"positions": "concat_paper", "tie_embeddings": "separate", "target_vocab_size": 37},
    "gelu_pre_norm_separate": {"activation": "gelu", "norm_first": True, "tie_embeddings": "separate"},
    "no_positions": {"positions": None},
    "uneven_depth": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "no_layers": {"num_encoder_layers": 0, "num_decoder_layers": 0},
}


def tiny(dropout: float = 0.0, **options) -> Transformer:
    """A small model whose biases and norms are random too."""
    model = Transformer(TransformerConfig(**TINY | {"dropout": dropout} | options))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model
