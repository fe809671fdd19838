"""nn.TransformerEncoder and nn.TransformerDecoder over the fused layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fused_transformer.attention import MultiheadAttention
from fused_transformer.nn.keys import Keys, padded_rows, run_nested
from fused_transformer.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer, _Layer, settled
from fused_transformer.nn.parts import Stream, add_norm, is_layer_norm, plain
from fused_transformer.nn.stand_in import stands_in
from fused_transformer.packing import Packing, pack_memory, packing_if_worth_it


class _Stack(nn.Module):
    """What the two kinds of stack share: when layers can be chained, when padding can be skipped, and the last norm."""

    skip_padding = False
    layers: nn.ModuleList
    norm: nn.Module | None

    layer_kind: type[nn.Module]
    attentions: tuple[str, ...]  # of a layer

    def chains(self) -> bool:
        """Whether the layers are ours and `plain`, so that what lies between them is nobody else's business."""
        return len(self.layers) > 0 and all(
            plain(layer, self.layer_kind)
            and all(plain(getattr(layer, name), MultiheadAttention) for name in self.attentions)
            for layer in self.layers
        )

    def _packing(self, x: Tensor, keys: Keys) -> Packing | None:
        """How x is packed, if that spares work and every layer computes the same from it."""
        if not keys.packable:
            return None
        packing = packing_if_worth_it(keys.lengths, x if self._batch_first() else x.transpose(0, 1))
        if packing is None or not self._takes_packed():
            return None
        return packing if self._batch_first() else _length_first(packing)

    def _takes_packed(self) -> bool:
        by_position = self.norm is None or is_layer_norm(self.norm)
        return by_position and all(cast(_Layer, layer).takes_packed() for layer in self.layers)

    def _batch_first(self) -> bool:
        return bool(self.layers[0].self_attn.batch_first)  # type: ignore[union-attr]

    def _zero_padding(self, out: Tensor, key_padding_mask: Tensor) -> Tensor:
        rows = padded_rows(key_padding_mask)
        return out.masked_fill((rows if self._batch_first() else rows.T)[..., None], 0.0)

    def _normalised(self, stream: Stream) -> Tensor:
        if self.norm is None:
            return stream.total()
        if stream.residual is None:
            return self.norm(stream.x)
        return add_norm(stream.x, stream.residual, cast(nn.Module, stream.dropout), self.norm)


@stands_in
class TransformerEncoder(_Stack, nn.TransformerEncoder):
    """Drop-in for torch.nn.TransformerEncoder: constructor, forward and state_dict are torch's.

    In pre-norm the sum at the end of a layer is fused with the next layer's norm (and the last with the stack's). What
    differs from torch's:

    - The results are the same in train, eval and no_grad. Rows that src_key_padding_mask hides are computed like the
      rest in each; in torch they are numbers in training and may be 0 in eval.
    - With `encoder.skip_padding = True`, rows of padding on the right come out as 0, in every mode and on every device;
      on the CPU, where much is padding and no mask but a causal one is given, the layers then work on the real tokens
      alone. Real tokens' results don't depend on it.
    - enable_nested_tensor and mask_check are accepted, and of no effect: no nested tensor is made.
    - is_causal=True is a mask in itself: it needs no `mask`, and beside one that allows more it still holds.
    - return_attention=True returns (output, weights): a tuple with each layer's (N, H, S, S).

    Layers that have hooks, are compiled or are somebody else's are called one by one, as torch does.
    """

    layer_kind, attentions = TransformerEncoderLayer, ("self_attn",)

    def __init__(
        self,
        encoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        with no_nested_tensor_warning():
            super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)  # type: ignore[arg-type]

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        return_attention: bool = False,
        rows_unread: bool = False,
    ):
        """src (N, S, E) if batch_first, else (S, N, E), or unbatched (S, E), to the same shape.

        Args:
            mask: (S, S) or (N·H, S, S). bool: True = ignore. float: added to the scores; has a gradient.
            src_key_padding_mask: (N, S), unbatched (S). bool: True = ignore this key. float: added to its scores.
            is_causal: row i sees rows 0 ... i only. None: what the mask says (as False does).
            return_attention: return the weights too; see above.
            rows_unread: nobody will read the rows of padding, so they may come out as anything. `Transformer` knows.
        """
        keys = Keys(mask, src_key_padding_mask, bool(is_causal))
        chains = self.chains()
        if src.is_nested and chains and keys.packable and not return_attention and self._takes_packed():
            return run_nested(src, keys.is_causal, lambda stream, packed: self._chained(stream, packed, False)[0])
        padded = not src.is_nested and src.dim() == 3 and src_key_padding_mask is not None
        zeros, skips = padded and self.skip_padding, padded and (self.skip_padding or rows_unread)
        if src.is_nested or not chains:
            out, weights = self._one_by_one(src, keys, return_attention)
        else:
            keys = settled(cast(TransformerEncoderLayer, self.layers[0]).self_attn, keys, src, src)
            packing = self._packing(src, keys) if skips and not return_attention else None
            if packing is not None:
                return packing.unpack(self._chained(Stream(packing.pack(src)), keys.packed(packing), False)[0])
            out, weights = self._chained(Stream(src), keys, return_attention)
        if zeros:
            out = self._zero_padding(out, src_key_padding_mask)  # type: ignore[arg-type]
        return (out, weights) if return_attention else out

    def _chained(self, stream: Stream, keys: Keys, wants_weights: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = []
        for layer in self.layers:
            stream, seen = layer(stream, keys=keys, return_attention=wants_weights)
            weights.append(seen)
        return self._normalised(stream), tuple(weights)

    def _one_by_one(self, x: Tensor, keys: Keys, wants_weights: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = []
        # layers of torch.nn's may count on float masks, as torch.nn's stack gives them
        theirs = [_as_float(mask, x.dtype) for mask in (keys.attn_mask, keys.key_padding_mask)]
        for layer in self.layers:
            if isinstance(layer, TransformerEncoderLayer):
                masks = [keys.attn_mask, keys.key_padding_mask]
            else:
                _refuse_weights(layer, wants_weights)
                masks = theirs
            options = {"src_mask": masks[0], "is_causal": keys.is_causal, "src_key_padding_mask": masks[1]}
            x = layer(x, **options, **_return_attention(wants_weights))
            if wants_weights:
                x, seen = x
                weights.append(seen)
        return x if self.norm is None else self.norm(x), tuple(weights)


@stands_in
class TransformerDecoder(_Stack, nn.TransformerDecoder):
    """Drop-in for torch.nn.TransformerDecoder: constructor, forward and state_dict are torch's.

    Chaining of layers, train and eval, is_causal: as `TransformerEncoder`. Masks are looked at once for all layers.

    - `decoder.skip_padding = True`: as an encoder's, for the rows that tgt_key_padding_mask hides.
    - return_attention=True returns (output, (own, memory)): tuples with each layer's weights of self_attn,
      (N, H, T, T), and of multihead_attn, (N, H, T, S).
    """

    layer_kind, attentions = TransformerDecoderLayer, ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        return_attention: bool = False,
    ):
        """tgt (N, T, E), memory (N, S, E) if batch_first, else (T, N, E), (S, N, E), or unbatched, to tgt's shape.

        Args: as `TransformerDecoderLayer.forward`; tgt_is_causal=None: what the mask says (as False does).
        """
        own = Keys(tgt_mask, tgt_key_padding_mask, bool(tgt_is_causal))
        of_memory = Keys(memory_mask, memory_key_padding_mask, memory_is_causal)
        skips = self.skip_padding and tgt.dim() == 3 and tgt_key_padding_mask is not None
        if not self.chains():
            out, weights = self._one_by_one(tgt, memory, own, of_memory, return_attention)
        else:
            first = cast(TransformerDecoderLayer, self.layers[0])
            own = settled(first.self_attn, own, tgt, tgt)
            of_memory = settled(first.multihead_attn, of_memory, tgt, memory)
            packing = None
            if skips and not return_attention and of_memory.packable:
                packing = self._packing(tgt, own)
            if packing is not None:
                by_batch = memory if self._batch_first() else memory.transpose(0, 1)
                packed_memory, offsets = pack_memory(by_batch, of_memory.lengths)
                keys = own.packed(packing), of_memory.packed(packing, offsets)
                return packing.unpack(self._chained(Stream(packing.pack(tgt)), packed_memory, keys, False)[0])
            out, weights = self._chained(Stream(tgt), memory, (own, of_memory), return_attention)
        if skips:
            out = self._zero_padding(out, tgt_key_padding_mask)  # type: ignore[arg-type]
        return (out, weights) if return_attention else out

    def _chained(self, stream: Stream, memory: Tensor, keys: tuple[Keys, Keys], wants_weights: bool):
        weights = []
        for layer in self.layers:
            stream, seen = layer(stream, memory, keys=keys, return_attention=wants_weights)
            weights.append(seen)
        return self._normalised(stream), tuple(zip(*weights, strict=True))

    def _one_by_one(self, x: Tensor, memory: Tensor, own: Keys, of_memory: Keys, wants_weights: bool):
        weights = []
        options = {
            "tgt_mask": own.attn_mask,
            "memory_mask": of_memory.attn_mask,
            "tgt_key_padding_mask": own.key_padding_mask,
            "memory_key_padding_mask": of_memory.key_padding_mask,
            "tgt_is_causal": own.is_causal,
            "memory_is_causal": of_memory.is_causal,
        }
        for layer in self.layers:
            if not isinstance(layer, TransformerDecoderLayer):
                _refuse_weights(layer, wants_weights)
            x = layer(x, memory, **options, **_return_attention(wants_weights))
            if wants_weights:
                x, seen = x
                weights.append(seen)
        return x if self.norm is None else self.norm(x), tuple(zip(*weights, strict=True))


@contextmanager
def no_nested_tensor_warning() -> Iterator[None]:
    """torch.nn.TransformerEncoder warns of each reason not to make nested tensors, which ours never makes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True", category=UserWarning)
        yield


def _length_first(packing: Packing) -> Packing:
    """The same sequences in a batch (L, B) instead of (B, L)."""
    batch, length = packing.shape
    index = packing.index % length * batch + packing.index // length
    return replace(packing, index=index, shape=(length, batch))


def _as_float(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as the float one that torch.nn makes of it."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def _return_attention(wanted: bool) -> dict:
    return {"return_attention": True} if wanted else {}


def _refuse_weights(layer: nn.Module, wanted: bool) -> None:
    if wanted:
        raise ValueError(f"return_attention needs layers of fused_transformer.nn, got {type(layer).__name__}")
