"""The attention weights of a `PackedTransformer`: its own packed matrices, over whole sequences instead of steps."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fused_transformer.inference import PackedTransformer, in_float32
from fused_transformer.kernels import attention_weights, attention_with_lse
from fused_transformer.kernels.decoder_step import memory_of
from fused_transformer.kernels.linear import linear


@in_float32
def packed_weights(
    model: PackedTransformer, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each layer's weights (B, H, rows, columns): encoder_self, encoder_decoder and decoder_self.

    Args:
        model: packed.
        source, target: (B, S) and (B, T), the tokens that are read.
        source_lengths, target_lengths: (B,), how many of them are real.
    """
    encoder_self: list[Tensor] = []
    encoder_decoder: list[Tensor] = []
    decoder_self: list[Tensor] = []

    def parts(x: Tensor, count: int) -> tuple[Tensor, ...]:
        """(B · length, count · E) to `count` tensors (B, H, length, D)."""
        return (
            x.view(len(source), -1, count, model.config.num_heads, x.shape[1] // count // model.config.num_heads)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )

    def attend(record: list[Tensor], q: Tensor, k: Tensor, v: Tensor, **masks) -> Tensor:
        out, lse = attention_with_lse(q, k, v, **masks)
        record.append(attention_weights(q, k, lse, **masks))
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    def encoder_attention(y: Tensor, layer) -> Tensor:
        return attend(encoder_self, *parts(linear(y, layer), 3), k_lengths=source_lengths)

    def self_attention(y: Tensor, layer) -> Tensor:
        q, k, v = parts(linear(y, layer), 3)
        return attend(decoder_self, q, k, v, k_lengths=target_lengths, causal="top_left")

    def memory_attention(y: Tensor, layer, keys_and_values) -> Tensor:
        (q,) = parts(linear(y, layer), 1)
        return attend(encoder_decoder, q, *keys_and_values, k_lengths=source_lengths)

    x = model._source(source).flatten(0, 1)
    for qkv, out, up, down, *norms in model._encoder:
        x = model._sublayer(x, norms[0], partial(encoder_attention, layer=qkv), out)
        x = model._sublayer(x, norms[1], partial(linear, layer=up, activation=model.config.activation), down)
    x = x if model._encoder_norm is None else model._normalised(x, model._encoder_norm)
    batch, length = source.shape
    memory = memory_of(x, model._memory, model.config.num_heads, batch, length, None)

    x = model._target(target).flatten(0, 1)
    for layer, keys_and_values in zip(model._decoder.layers, memory, strict=True):
        to_memory = partial(memory_attention, layer=layer.query, keys_and_values=keys_and_values)
        inner = partial(linear, layer=layer.up, activation=model.config.activation)
        x = model._sublayer(x, layer.norms[0], partial(self_attention, layer=layer.qkv), layer.self_out)
        x = model._sublayer(x, layer.norms[1], to_memory, layer.memory_out)
        x = model._sublayer(x, layer.norms[2], inner, layer.down)
    return encoder_self, encoder_decoder, decoder_self
