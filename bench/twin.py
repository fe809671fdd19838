"""Trains as `python -m fused_transformer train` does, with the same options, but by torch.nn's layers.

    python -m bench.twin --source train.en --target train.fr --output DIR ...

Initial weights, batches, places of dropout, schedule, loss, checkpoints and validation are those of `train`; in each
training step embedding, encoder and decoder are torch's own, on padded batches. So two runs of one recipe show
whether the fused kernels cost any quality.
"""

from __future__ import annotations

import math
import sys
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer import Transformer, TransformerConfig, checkpoint, cli_train
from fused_transformer.kernels import sinusoidal_positions

NAMES = {"feed_forward.linear1": "linear1", "feed_forward.linear2": "linear2"}


class Twin(Transformer):
    """A Transformer whose training steps are torch.nn's, on the same parameters; in eval mode it is what it was."""

    def __init__(self, config: TransformerConfig, device=None, dtype=None) -> None:
        super().__init__(config, device, dtype)
        if config.tie_embeddings != "shared" or config.positions != "interleaved" or config.norm_first:
            raise ValueError(
                "the twin is the paper's model: shared embeddings, its positions, norms after the sublayers"
            )
        if config.attention_dropout or config.activation_dropout:
            raise ValueError("the twin has dropout in the paper's places alone")
        sizes = {
            **{"d_model": config.d_model, "nhead": config.num_heads, "dim_feedforward": config.d_feedforward},
            **{"dropout": config.dropout, "activation": config.activation, "layer_norm_eps": config.layer_norm_eps},
            "batch_first": True,
        }
        # Kept where nn.Module does not look: the parameters have one name each, that of the fused layers.
        self.__dict__["encoder_layers"] = [
            _on_parameters_of(layer, nn.TransformerEncoderLayer(**sizes)) for layer in self.encoder.layers
        ]
        self.__dict__["decoder_layers"] = [
            _on_parameters_of(layer, nn.TransformerDecoderLayer(**sizes)) for layer in self.decoder.layers
        ]

    def encode(self, source_tokens: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().encode(source_tokens, source_lengths)
        x, hidden = self._embedded(source_tokens), source_tokens == self.config.padding_idx
        self.__dict__["hidden_memory"] = hidden
        for layer in self.__dict__["encoder_layers"]:
            x = layer(x, src_key_padding_mask=hidden)
        return x

    def decode(
        self,
        target_tokens: Tensor,
        memory: Tensor,
        memory_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        if not self.training:
            return super().decode(target_tokens, memory, memory_lengths, target_lengths)
        x = self._embedded(target_tokens)
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        for layer in self.__dict__["decoder_layers"]:
            x = layer(
                x,
                memory,
                tgt_mask=future,
                tgt_is_causal=True,
                memory_key_padding_mask=self.__dict__["hidden_memory"],
            )
        return x

    def _embedded(self, tokens: Tensor) -> Tensor:
        table, config = self.source_embedding.weight, self.config
        scaled = F.embedding(tokens, table) * math.sqrt(config.d_model)
        positions = sinusoidal_positions(tokens.shape[1], config.d_model, dtype=scaled.dtype)
        return F.dropout(scaled + positions, config.dropout)


def _on_parameters_of(ours: nn.Module, layer: nn.Module) -> nn.Module:
    """A torch.nn layer that computes with a fused layer's parameters, with dropout in the paper's places alone."""
    for name, parameter in ours.named_parameters():
        for long, short in NAMES.items():
            name = name.replace(long, short)
        owner = layer.get_submodule(name.rpartition(".")[0])
        assert cast(Tensor, getattr(owner, name.rpartition(".")[2])).shape == parameter.shape
        setattr(owner, name.rpartition(".")[2], parameter)
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    cast(nn.Dropout, layer.dropout).p = 0.0  # of the feed-forward activations
    return layer.train()


def main(arguments: list[str]) -> int:
    cli_train.Transformer = checkpoint.Transformer = Twin  # type: ignore[misc,attr-defined]
    return cli_train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
