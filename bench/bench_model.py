"""A whole Transformer: tokens a second in training and in greedy decoding, against one built from torch.nn.

The other model is what one writes today: nn.Embedding with a table of positions, nn.TransformerEncoder and
nn.TransformerDecoder, and the tied output projection; with the same weights. Training is a step on a padded batch:
forward, label-smoothed cross entropy, backward, Adam. Decoding is a fixed number of greedy steps; the torch.nn model
has no cache of keys and values, so it decodes the whole prefix at each step (its encoder runs once).
"""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import shapes
from bench.agreement import assert_close_in_norm
from bench.baselines import mixed, sentence_lengths
from fused_transformer import GraphedTransformer, Transformer, TransformerConfig
from fused_transformer.kernels import sinusoidal_positions

PAD, BOS = 0, 1
DROPOUT = 0.1
STEPS = 24


class TorchTransformer(nn.Module):
    """The paper's model out of torch.nn's parts."""

    def __init__(self, ours: Transformer, longest: int):
        super().__init__()
        config = ours.config
        sizes = (config.d_model, config.num_heads, config.d_feedforward, config.dropout)
        self.embedding = nn.Embedding(config.source_vocab_size, config.d_model, padding_idx=PAD)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, batch_first=True), config.num_encoder_layers
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, batch_first=True), config.num_decoder_layers
        )
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("positions", sinusoidal_positions(longest, config.d_model))
        self.register_buffer("future", torch.ones(longest, longest, dtype=torch.bool).triu(1))

        def renamed(state: dict) -> dict:
            return {name.replace("feed_forward.", ""): weight for name, weight in state.items()}

        self.embedding.load_state_dict(ours.source_embedding.state_dict())
        self.encoder.load_state_dict(renamed(ours.encoder.state_dict()))
        self.decoder.load_state_dict(renamed(ours.decoder.state_dict()))

    def embed(self, tokens: Tensor) -> Tensor:
        scaled = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scaled + self.positions[: tokens.shape[1]])

    def encode(self, source: Tensor) -> Tensor:
        return self.encoder(self.embed(source), src_key_padding_mask=source == PAD)

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        length = target.shape[1]
        return self.decoder(
            self.embed(target),
            memory,
            tgt_mask=self.future[:length, :length],
            tgt_is_causal=True,
            memory_key_padding_mask=source == PAD,
        )

    def project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.project(self.decode(target, self.encode(source), source))


def build(shape: shapes.Model, device: str) -> dict[str, nn.Module]:
    """Both models with the same weights."""
    config = TransformerConfig(
        source_vocab_size=shape.vocabulary,
        d_model=shape.width,
        num_heads=shape.heads,
        d_feedforward=shape.feedforward,
        num_encoder_layers=shape.layers,
        num_decoder_layers=shape.layers,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,  # torch.nn's layers have dropout in these two places too
        activation_dropout=DROPOUT,
    )
    ours = Transformer(config)
    nn.init.zeros_(ours.source_embedding.weight[PAD])  # as nn.Embedding has it
    return {"torch.nn": TorchTransformer(ours, shape.length).to(device), "fused": ours.to(device)}


def sentences(shape: shapes.Model, device: str) -> tuple[Tensor, Tensor]:
    """(B, L) tokens padded on the right, and their lengths: 60 % of L on average."""
    lengths = sentence_lengths(shape.batch, shape.length, device)
    tokens = torch.randint(3, shape.vocabulary, (shape.batch, shape.length), device=device)
    return tokens.masked_fill(torch.arange(shape.length, device=device) >= lengths[:, None], PAD), lengths


@pytest.mark.parametrize("shape", [shapes.MODEL_SMALL, shapes.MODEL_BASE], ids=str)
def bench_training_step(compare, shape, device):
    models = build(shape, device)
    (source, _), (target, target_lengths) = sentences(shape, device), sentences(shape, device)
    expected = F.pad(target[:, 1:], (0, 1), value=PAD)
    optimizers = {
        label: torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-9)
        for label, model in models.items()
    }

    def loss_of(model: nn.Module) -> Tensor:
        with mixed(device, next(model.parameters()).dtype):
            logits = model(source, target)
            return F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=PAD, label_smoothing=0.1)

    def step(label: str) -> Tensor:
        optimizers[label].zero_grad()
        loss = loss_of(models[label])
        loss.backward()
        optimizers[label].step()
        return loss

    def check(_results) -> None:
        def losses(model: nn.Module) -> dict[str, Tensor]:
            """The loss and its gradient in every weight, under torch.nn's names."""
            model.eval().zero_grad()
            loss = loss_of(model)
            loss.backward()
            model.train()
            gradients = {name: x.grad for name, x in model.named_parameters()}
            names = {
                name: name.replace("feed_forward.", "").replace("source_embedding", "embedding") for name in gradients
            }
            return {"loss": loss.detach()} | {names[name]: x for name, x in gradients.items()}

        torchs = models["torch.nn"]
        exact = deepcopy(torchs).double()
        exact.load_state_dict(torchs.state_dict())
        ours = deepcopy(models["fused"])
        ours.encoder.load_state_dict(torchs.encoder.state_dict())
        ours.decoder.load_state_dict(torchs.decoder.state_dict())
        ours.source_embedding.load_state_dict(torchs.embedding.state_dict())
        assert_close_in_norm(losses(ours), losses(exact), naive=losses(torchs) if device == "cuda" else None)

    implementations = {label: lambda label=label: step(label) for label in models}
    compare(implementations, check=check, tokens=int(target_lengths.sum()))


@pytest.mark.parametrize("shape", [shapes.MODEL_SMALL, shapes.MODEL_BASE], ids=str)
def bench_greedy_decoding(compare, shape, device):
    models = {label: model.eval() for label, model in build(shape, device).items()}
    source, lengths = sentences(shape, device)
    first = torch.full((shape.batch, 1), BOS, device=device)

    @torch.no_grad()
    def without_cache() -> Tensor:
        model, target = models["torch.nn"], first
        memory = model.encode(source)
        for _ in range(STEPS):
            logits = model.project(model.decode(target, memory, source)[:, -1])
            target = torch.cat([target, logits.argmax(-1, keepdim=True)], dim=1)
        return target

    if device == "cuda":  # as `translate --cuda-graphs` does; "unpacked" is the model itself, each step op by op
        models = {**models, "unpacked": models["fused"], "fused": GraphedTransformer(models["fused"])}

    @torch.no_grad()
    def with_cache(label: str) -> Tensor:
        model, target = models[label], first
        state = model.start(model.encode(source, lengths), lengths)
        for _ in range(STEPS):
            logits = model.project(model.step(target[:, -1], state))
            target = torch.cat([target, logits.argmax(-1, keepdim=True)], dim=1)
        return target

    def check(results) -> None:
        for label in results:
            # With random weights the most likely token is nearly a tie now and then, and on a GPU there are many rows.
            same = (results[label] == results["torch.nn"]).all(1).float().mean()
            assert same == 1 if device == "cpu" else same > 0.95, f"{label}: {same:.1%} of translations are the same"

    ours = {label: partial(with_cache, label) for label in models if label != "torch.nn"}
    compare({"torch.nn": without_cache, **ours}, check=check, tokens=STEPS * shape.batch)
