"""nn.Transformer over the fused layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.masks import may_look
from fused_transformer.nn.parts import plain
from fused_transformer.nn.stacks import TransformerDecoder, TransformerEncoder, no_nested_tensor_warning
from fused_transformer.nn.stand_in import OURS, adopt, stands_in


class TransformerAttention(NamedTuple):
    """Each layer's weights, a tensor (N, H, queries, keys) per layer."""

    encoder: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]


@stands_in
class Transformer(nn.Transformer):
    """Drop-in for torch.nn.Transformer: constructor, initial values, forward and state_dict are torch's.

    An encoder and a decoder, each a stack of layers and a last norm (in post-norm too), without embeddings. Ours
    inside, unless custom_encoder or custom_decoder is given: see `TransformerEncoder` and `TransformerDecoder` for what
    differs. Where memory_key_padding_mask is as src_key_padding_mask, nobody reads the encoder's rows of padding: on
    the CPU it works on the real tokens alone. return_attention=True returns (output, TransformerAttention).

    The model of the paper, with embeddings, training and translation, is `fused_transformer.Transformer`.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        sizes = (d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation)
        options = (layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        with no_nested_tensor_warning():
            super().__init__(*sizes, custom_encoder, custom_decoder, *options)
        for custom, stack in ((custom_encoder, self.encoder), (custom_decoder, self.decoder)):
            if custom is None:
                for module in stack.modules():
                    if type(module) in OURS:
                        adopt(module)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        return_attention: bool = False,
    ):
        """src (N, S, E) and tgt (N, T, E) if batch_first, else (S, N, E) and (T, N, E), or unbatched, to tgt's shape.

        Args: as torch's; the masks as `TransformerEncoder.forward` and `TransformerDecoderLayer.forward` take them.

        Raises:
            RuntimeError: batch sizes that differ, or a width that is not d_model.
            ValueError: return_attention of a custom encoder or decoder that has none.
        """
        batch_axis = 0 if self.batch_first else 1
        if src.dim() == 3 and src.size(batch_axis) != tgt.size(batch_axis):
            raise RuntimeError("the batch number of src and tgt must be equal")
        if src.size(-1) != self.d_model or tgt.size(-1) != self.d_model:
            raise RuntimeError("the feature number of src and tgt must be equal to d_model")

        source_options: dict = {
            "mask": src_mask,
            "src_key_padding_mask": src_key_padding_mask,
            "is_causal": src_is_causal,
        }
        options: dict = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
            "tgt_is_causal": tgt_is_causal,
            "memory_is_causal": memory_is_causal,
        }
        if self._padding_is_unread(src_key_padding_mask, memory_key_padding_mask):
            source_options["rows_unread"] = True
        if not return_attention:
            return self.decoder(tgt, self.encoder(src, **source_options), **options)
        for stack, kind in ((self.encoder, TransformerEncoder), (self.decoder, TransformerDecoder)):
            if not isinstance(stack, kind):
                raise ValueError(f"return_attention needs stacks of fused_transformer.nn, got {type(stack).__name__}")
        memory, encoder_weights = self.encoder(src, **source_options, return_attention=True)
        out, (own, of_memory) = self.decoder(tgt, memory, **options, return_attention=True)
        return out, TransformerAttention(encoder_weights, own, of_memory)

    def _padding_is_unread(self, of_source: Tensor | None, of_memory: Tensor | None) -> bool:
        """Whether the decoder sees no row of the encoder's that is padding, and nobody else sees the encoder's rows."""
        if of_source is None or of_memory is None or not plain(self.encoder, TransformerEncoder):
            return False
        if not plain(self.decoder, TransformerDecoder) or not self.decoder.chains():
            return False
        if not (may_look(of_source) and may_look(of_memory)) or of_source.dtype != of_memory.dtype:
            return False
        return of_source is of_memory or torch.equal(of_source, of_memory)
