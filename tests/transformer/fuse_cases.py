"""A model for the tests of fuse and model_report, with what people subclass."""

from __future__ import annotations

import torch
from torch import nn

from tests.transformer.nn_cases import E, F, H


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass, which fuse can't know: it stays, and what is in it is swapped."""


class OwnNorm(nn.LayerNorm):
    pass


class Classifier(nn.Module):
    """What people build: a table, an encoder, a norm used twice, pooling by attention, a head."""

    def __init__(self, layer=nn.TransformerEncoderLayer):
        super().__init__()
        self.table = nn.Embedding(30, E)
        self.encoder = nn.TransformerEncoder(layer(E, H, F, 0.0, batch_first=True), 2)
        self.pool = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm = self.same_norm = nn.LayerNorm(E)
        self.rms = nn.RMSNorm(E)
        self.register_buffer("query", torch.randn(1, 1, E))
        self.head = nn.Linear(E, 5)

    def forward(self, tokens):
        hidden = tokens == 0
        x = self.encoder(self.norm(self.table(tokens)), src_key_padding_mask=hidden)
        pooled, _ = self.pool(self.query.expand(len(x), 1, E), x, x, key_padding_mask=hidden)
        return self.head(self.rms(self.same_norm(pooled[:, 0])))


TOKENS = torch.tensor([[5, 3, 9, 7, 2], [4, 8, 0, 0, 0], [1, 1, 6, 2, 0]])
