"""The Transformer: embeddings, encoder, decoder and output projection."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer import incremental
from fused_transformer.add_norm import AddLayerNorm
from fused_transformer.config import TransformerConfig
from fused_transformer.embedding import TokenEmbedding
from fused_transformer.incremental import DecoderState
from fused_transformer.layer_running import run_layer
from fused_transformer.layers import DecoderLayer, EncoderLayer
from fused_transformer.masks import may_look, real_lengths, require_rows
from fused_transformer.packing import pack_memory, packing_if_worth_it
from fused_transformer.plain import plain
from fused_transformer.products import applied, linear


class Encoder(nn.Module):
    """The stack of encoder layers; in pre-norm, one LayerNorm after the last.

    Post-norm ends with its last layer's norm, as in the paper (nn.Transformer adds one more).

    Args:
        num_layers: how many.
        options: of each layer, as `EncoderLayer` takes them: d_model, num_heads, norm_first ...
    """

    def __init__(self, num_layers: int = 6, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(**options) for _ in range(num_layers))
        self.norm = _final_norm(**options)
        self.checkpoint_activations = False  # see layer_running.checkpoint_activations

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B, S, E) and the real tokens of each sequence, lengths (B,), to (B, S, E).

        Rows of padding hold numbers without meaning. Where much is padding, the layers work on the real tokens alone.
        """
        packing = packing_if_worth_it(lengths, x)
        options, residual = {"lengths": lengths}, None
        if packing is not None:
            x, options = packing.pack(x), {"offsets": packing.offsets}
        for layer in self.layers:
            x, residual = run_layer(layer, self.checkpoint_activations, x, **options, residual=residual, chained=True)
        x = x if self.norm is None else self.norm(x, residual)
        return x if packing is None else packing.unpack(x)


class Decoder(nn.Module):
    """The stack of decoder layers, each attending to the encoder's output; in pre-norm, one LayerNorm after the last.

    Args: as `Encoder`, for `DecoderLayer`.
    """

    def __init__(self, num_layers: int = 6, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(**options) for _ in range(num_layers))
        self.norm = _final_norm(**options)
        self.checkpoint_activations = False  # see layer_running.checkpoint_activations

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, E) and memory (B, S, E), with their lengths (B,), to (B, L, E). Position i sees x up to i.

        Rows of padding hold numbers without meaning. Where much is padding, the layers work on the real tokens alone.
        """
        packing = packing_if_worth_it(lengths, x)
        options, residual = {"lengths": lengths, "memory_lengths": memory_lengths}, None
        if packing is not None:
            memory, memory_offsets = pack_memory(memory, memory_lengths)
            x, options = packing.pack(x), {"offsets": packing.offsets, "memory_offsets": memory_offsets}
        for layer in self.layers:
            x, residual = run_layer(
                layer, self.checkpoint_activations, x, memory, **options, residual=residual, chained=True
            )
        x = x if self.norm is None else self.norm(x, residual)
        return x if packing is None else packing.unpack(x)


class Transformer(nn.Module):
    """The encoder-decoder model of the paper.

        memory = encoder(√E · table[source] + PE)
        hidden = decoder(√E · table[target] + PE, memory)             each position sees the target up to itself
        logits = hidden · tableᵀ                                      log p(next token) = log_softmax(logits)

    Args:
        config: sizes and options; `TransformerConfig(source_vocab_size=V)` is the paper's base model.
        device, dtype: of the parameters.

    Tokens are padded on the right with config.padding_idx. Padding never changes the results at real tokens.

    Example:
        >>> config = TransformerConfig(source_vocab_size=100, d_model=64, num_heads=4, d_feedforward=128)
        >>> model = Transformer(config)
        >>> source = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
        >>> target = torch.tensor([[1, 11, 12], [1, 13, 14]])
        >>> model(source, target).shape
        torch.Size([2, 3, 100])

    Source: Vaswani et al. 2017, section 3.
    """

    def __init__(self, config: TransformerConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.config = config
        place = {"device": device, "dtype": dtype}
        embedding = {
            "positions": config.positions,
            "padding_idx": config.padding_idx,
            "dropout": config.dropout,
            **place,
        }
        self.source_embedding = TokenEmbedding(config.source_vocab_size, config.d_model, **embedding)
        # None where tied, so that a table has one name in the state_dict
        self.target_embedding = (
            None
            if config.tie_embeddings == "shared"
            else TokenEmbedding(config.target_vocab_size, config.d_model, **embedding)
        )
        layers = _layer_options(config) | place
        self.encoder = Encoder(config.num_encoder_layers, **layers)
        self.decoder = Decoder(config.num_decoder_layers, **layers)
        self.output_projection = None
        if config.tie_embeddings == "separate":
            self.output_projection = nn.Linear(config.d_model, config.target_vocab_size, bias=False, **place)
            nn.init.normal_(self.output_projection.weight, std=config.d_model**-0.5)

    def forward(
        self,
        source_tokens: Tensor,
        target_tokens: Tensor,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V): row i of a sequence is for the token after target_tokens[:, i].

        Args:
            source_tokens: (B, S) int64 or int32.
            target_tokens: (B, L), beginning with bos_idx: the translation one step behind what is predicted.
            source_lengths: (B,) integers; None: counted from the padding.
            target_lengths: (B,) integers; never needed (no position sees later ones), but spares work. None: counted
                from the padding where the tokens are on the CPU.

        Raises:
            ValueError: tokens are not 2-D, differ in their batch, or have padding ahead of a token (looked for where
                the lengths are not given, and on the CPU only).
        """
        require_rows("source_tokens", source_tokens)
        require_rows("target_tokens", target_tokens)
        if source_lengths is None:
            source_lengths = self.lengths(source_tokens)
        if target_lengths is None:
            target_lengths = self.lengths(target_tokens) if may_look(target_tokens) else None
        memory = self.encode(source_tokens, source_lengths)
        return self.project(self.decode(target_tokens, memory, source_lengths, target_lengths))

    def lengths(self, tokens: Tensor) -> Tensor:
        """(B,) int64: the tokens of each row of (B, L) that are not padding.

        Raises:
            ValueError: padding ahead of a token (looked for on the CPU only: a GPU would have to be waited for).
        """
        return real_lengths(tokens, self.config.padding_idx)

    def encode(self, source_tokens: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Memory (B, S, E) of source_tokens (B, S). Rows of padding hold numbers without meaning."""
        require_rows("source_tokens", source_tokens)
        if source_lengths is None:
            source_lengths = self.lengths(source_tokens)
        return self.encoder(self.source_embedding(source_tokens), source_lengths)

    def decode(
        self,
        target_tokens: Tensor,
        memory: Tensor,
        memory_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, E) of target_tokens (B, L), each from the tokens up to its own and all of memory.

        Args:
            memory: (B, S, E), as `encode` returned it.
            memory_lengths: (B,) integers, the source's lengths; None: all of memory is real.
            target_lengths: (B,) integers; see `forward`.
        """
        require_rows("target_tokens", target_tokens)
        sizes = memory.shape[0], target_tokens.shape[0]  # len() would make them constants of an exported graph
        if sizes[0] != sizes[1]:
            raise ValueError(f"source and target must have one batch size, got {sizes[0]} and {sizes[1]}")
        return self.decoder(self._embed_target(target_tokens), memory, target_lengths, memory_lengths)

    @torch.no_grad()
    def start(self, memory: Tensor, memory_lengths: Tensor | None = None, *, beam_size: int = 1) -> DecoderState:
        """The state ahead of the first `step`; memory (B, S, E) gets beam_size rows a sequence, in order.

        Raises:
            ValueError: beam_size below 1, or the model is in training mode (steps have no dropout).
        """
        if self.training:
            raise ValueError("decoding step by step is for inference: call eval() on the model first")
        return incremental.start(
            cast("list[DecoderLayer]", list(self.decoder.layers)), memory, memory_lengths, beam_size
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Hidden states (R, E) of the next position, from its tokens (R,); `state` grows by it.

        Equals the last position of `decode` on all tokens so far, at the cost of that position alone.
        """
        x, residual = self._embed_target(tokens[:, None], start=state.length), None
        state.make_room()
        for index, layer in enumerate(self.decoder.layers):
            x, residual = incremental.step_layer(cast(DecoderLayer, layer), index, x, residual, state)
        state.length += 1
        x = x if self.decoder.norm is None else self.decoder.norm(x, residual)
        return x.squeeze(1)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., E)."""
        if self.output_projection is not None:
            return applied(self.output_projection, hidden)
        return linear(hidden, self._target_table().weight)

    def output_weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (V, E) and bias of `project`, where it is a linear layer and nothing more: not hooked or replaced."""
        projection = self.output_projection
        if projection is None:
            return self._target_table().weight, None
        return (projection.weight, projection.bias) if plain(projection, nn.Linear) else None

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """log_softmax(project(hidden)), (..., V) float32."""
        return F.log_softmax(self.project(hidden), dim=-1, dtype=torch.float32)

    def _target_table(self) -> TokenEmbedding:
        return self.source_embedding if self.target_embedding is None else self.target_embedding

    def _embed_target(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        return self._target_table()(tokens, start=start)


def _layer_options(config: TransformerConfig) -> dict:
    return {
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "d_feedforward": config.d_feedforward,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "activation": config.activation,
        "norm_first": config.norm_first,
        "layer_norm_eps": config.layer_norm_eps,
    }


def _final_norm(
    *, d_model=512, dropout=0.1, norm_first=False, layer_norm_eps=1e-5, bias=True, device=None, dtype=None, **_
) -> AddLayerNorm | None:
    """The norm that ends a stack of layers with these options; the last layer's dropout is its."""
    if not norm_first:
        return None
    return AddLayerNorm(d_model, dropout=dropout, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)
