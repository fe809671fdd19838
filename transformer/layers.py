"""Encoder and decoder layers: sublayers, each followed (or preceded) by residual + dropout + LayerNorm in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.add_norm import AddLayerNorm
from fused_transformer.attention import MultiheadAttention
from fused_transformer.feed_forward import FeedForward
from fused_transformer.packing import pack_memory, packing_if_worth_it

Sublayer = Callable[[Tensor], Tensor]


class _Layer(nn.Module):
    """What the two kinds of layer share: their parts, initial weights, and the order of sublayer and norm."""

    attentions: tuple[str, ...]  # names of its MultiheadAttention modules; they are torch.nn's
    norms: tuple[str, ...]  # names of its AddLayerNorm modules, one for each sublayer, in order
    feed_forward: FeedForward

    def __init__(
        self,
        d_model: int = 512,
        num_heads: int = 8,
        d_feedforward: int = 2048,
        dropout: float = 0.1,
        *,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        activation: str = "relu",
        norm_first: bool = False,
        layer_norm_eps: float = 1e-5,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        place = {"bias": bias, "device": device, "dtype": dtype}
        self.norm_first, self.dropout = norm_first, dropout
        for name in self.attentions:
            setattr(self, name, MultiheadAttention(d_model, num_heads, attention_dropout, batch_first=True, **place))
        self.feed_forward = FeedForward(
            d_model, d_feedforward, dropout=activation_dropout, activation=activation, **place
        )
        for name in self.norms:
            setattr(self, name, AddLayerNorm(d_model, dropout=dropout, eps=layer_norm_eps, **place))
        self.register_load_state_dict_pre_hook(_accept_torch_names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, drawn for this layer alone: Xavier uniform for each matrix, 0 for biases, norms at 1 and 0.

        W^Q, W^K and W^V count as three E × E matrices, as in tensor2tensor and The Annotated Transformer
        (nn.MultiheadAttention draws the three as one 3E × E matrix, so by a factor √2 smaller).
        """
        for name in self.attentions:
            attention = getattr(self, name)
            for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
                nn.init.xavier_uniform_(weight)
            for bias in (attention.in_proj_bias, attention.out_proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)
        self.feed_forward.reset_parameters()
        for name in self.norms:
            getattr(self, name).reset_parameters()

    def run_sublayers(self, sublayers: tuple[Sublayer, ...], x: Tensor, residual: Tensor | None, chained: bool):
        """x through the sublayers, each with its norm; `residual` and `chained` as in `EncoderLayer.forward`."""
        norms = [getattr(self, name) for name in self.norms]
        if not self.norm_first:
            for sublayer, norm in zip(sublayers, norms, strict=True):
                x = norm(sublayer(x), x)
            return (x, None) if chained else x
        for sublayer, norm in zip(sublayers, norms, strict=True):
            y, residual = norm.with_total(x, residual)
            x = sublayer(y)
        assert residual is not None  # a layer has at least one sublayer
        return (x, residual) if chained else residual + F.dropout(x, self.dropout, self.training)


class EncoderLayer(_Layer):
    """One layer of the encoder: self-attention, then the feed-forward network.

        x = norm1(x + dropout(self_attn(x)))                    post-norm, as in the paper (default)
        x = norm2(x + dropout(feed_forward(x)))

        x = x + dropout(self_attn(norm1(x)))                    pre-norm (norm_first=True)
        x = x + dropout(feed_forward(norm2(x)))

    Args:
        d_model, num_heads, d_feedforward: E, H, F. H must divide E.
        dropout: of each sublayer's output, in training.
        attention_dropout: of the attention weights; the paper has none.
        activation_dropout: of the feed-forward network's activations; the paper has none.
        activation: "relu" (the paper) or "gelu".
        norm_first: pre-norm instead of post-norm.
        layer_norm_eps: added to the variance.
        bias: whether linears and norms have biases.

    Weights: names as in nn.TransformerEncoderLayer, except that linear1 and linear2 are in feed_forward; its state_dict
        loads as it is (its `dropout` is all three of ours).
    Initial weights: see `reset_parameters`; no two layers begin with the same ones.
    Source: Vaswani et al. 2017, section 3.1; pre-norm: Xiong et al. 2020, arXiv:2002.04745.
    """

    attentions, norms = ("self_attn",), ("norm1", "norm2")
    self_attn: MultiheadAttention

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        offsets: Tensor | None = None,
        residual: Tensor | None = None,
        chained: bool = False,
    ):
        """x (B, S, E) to (B, S, E); a packed batch (T, E) to (T, E).

        Args:
            lengths: (B,) integers, the real tokens of each sequence (padded on the right).
            key_padding_mask, attn_mask, is_causal: as `MultiheadAttention.forward` takes them.
            offsets: (B + 1,) integers, for packed batches; see `Packing`. No lengths and masks then, but is_causal.
            residual, chained: between the layers of a stack, (x, residual) goes in and comes out. In pre-norm x is then
                the last sublayer's output, not yet added to the residual: the next norm does it in the same pass.

        Rows beyond `lengths` come out as numbers without meaning. Where there are many, the layer works on the real
        tokens alone; a stack sees to that itself, once for all its layers.
        """
        if not chained and key_padding_mask is None and attn_mask is None:
            packing = packing_if_worth_it(lengths, x)
            if packing is not None:
                y = self.forward(packing.pack(x), is_causal=is_causal, offsets=packing.offsets)
                return packing.unpack(y)

        def attend(y: Tensor) -> Tensor:
            return self.self_attn(
                y,
                y,
                y,
                key_padding_mask=key_padding_mask,
                need_weights=False,
                attn_mask=attn_mask,
                is_causal=is_causal,
                key_lengths=lengths,
                q_offsets=offsets,
            )[0]

        return self.run_sublayers((attend, self.feed_forward), x, residual, chained)


class DecoderLayer(_Layer):
    """One layer of the decoder: masked self-attention, attention to the encoder's output, the feed-forward network.

        x = norm1(x + dropout(self_attn(x)))                    post-norm, as in the paper (default)
        x = norm2(x + dropout(multihead_attn(x, memory)))
        x = norm3(x + dropout(feed_forward(x)))

        x = x + dropout(self_attn(norm1(x)))                    pre-norm (norm_first=True)
        x = x + dropout(multihead_attn(norm2(x), memory))
        x = x + dropout(feed_forward(norm3(x)))

    Args, weights, initial weights and source: as `EncoderLayer`, with nn.TransformerDecoderLayer's names.
    """

    attentions, norms = ("self_attn", "multihead_attn"), ("norm1", "norm2", "norm3")
    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        memory_key_padding_mask: Tensor | None = None,
        memory_attn_mask: Tensor | None = None,
        offsets: Tensor | None = None,
        memory_offsets: Tensor | None = None,
        residual: Tensor | None = None,
        chained: bool = False,
    ):
        """x (B, L, E) and memory (B, S, E), the encoder's output, to (B, L, E); or both packed, to (T, E).

        Args:
            lengths, memory_lengths: (B,) integers, the real tokens of each sequence (padded on the right).
            key_padding_mask, attn_mask, is_causal: of the self-attention, as `MultiheadAttention.forward` takes them;
                causal unless told otherwise.
            memory_key_padding_mask, memory_attn_mask: of the attention to memory.
            offsets, memory_offsets: (B + 1,) integers, for packed batches; see `EncoderLayer.forward`.
            residual, chained: see `EncoderLayer.forward`; rows beyond `lengths` too.
        """
        masks = (key_padding_mask, attn_mask, memory_key_padding_mask, memory_attn_mask)
        if not chained and all(mask is None for mask in masks):
            packing = packing_if_worth_it(lengths, x)
            if packing is not None:
                memory, memory_offsets = pack_memory(memory, memory_lengths)
                y = self.forward(
                    packing.pack(x),
                    memory,
                    is_causal=is_causal,
                    offsets=packing.offsets,
                    memory_offsets=memory_offsets,
                )
                return packing.unpack(y)

        def attend(y: Tensor) -> Tensor:
            return self.self_attn(
                y,
                y,
                y,
                key_padding_mask=key_padding_mask,
                need_weights=False,
                attn_mask=attn_mask,
                is_causal=is_causal,
                key_lengths=lengths,
                q_offsets=offsets,
            )[0]

        def attend_to_memory(y: Tensor) -> Tensor:
            return self.multihead_attn(
                y,
                memory,
                memory,
                key_padding_mask=memory_key_padding_mask,
                need_weights=False,
                attn_mask=memory_attn_mask,
                key_lengths=memory_lengths,
                q_offsets=offsets,
                k_offsets=memory_offsets,
            )[0]

        return self.run_sublayers((attend, attend_to_memory, self.feed_forward), x, residual, chained)


def _accept_torch_names(module, state_dict, prefix, *_):
    """nn.TransformerEncoderLayer and DecoderLayer hold linear1 and linear2 themselves: their state_dicts load too."""
    for linear in ("linear1", "linear2"):
        for name in ("weight", "bias"):
            if f"{prefix}{linear}.{name}" in state_dict:
                state_dict[f"{prefix}feed_forward.{linear}.{name}"] = state_dict.pop(f"{prefix}{linear}.{name}")
