"""nn.TransformerEncoderLayer and nn.TransformerDecoderLayer over the fused ops."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.attention import MultiheadAttention
from fused_transformer.nn.keys import Keys, run_nested
from fused_transformer.nn.parts import Stream, activated, add_norm, known_activation, plain, position_wise
from fused_transformer.nn.stand_in import OURS, adopt, stands_in
from fused_transformer.products import applied

Step = tuple[Callable[[Tensor], Tensor], nn.Module, nn.Module]  # a sublayer, its dropout, its norm


class _Layer(nn.Module):
    """What the two kinds of layer share: the order of sublayers, sums and norms."""

    parts: tuple[str, ...]  # names of the submodules that are called
    norm_first: bool
    linear1: nn.Linear
    dropout: nn.Dropout
    linear2: nn.Linear
    activation: Callable[[Tensor], Tensor]

    def _adopt_parts(self) -> None:
        """The constructor of torch.nn has made the parts, with its initial values; now they are ours."""
        for part in self.children():
            if type(part) in OURS:
                adopt(part)

    def _through(self, steps: tuple[Step, ...], stream: Stream) -> Stream:
        if self.norm_first:
            for sublayer, dropout, norm in steps:
                y, total = stream.normalised(norm)
                stream = Stream(sublayer(y), total, dropout)
            return stream
        x = stream.total()
        for sublayer, dropout, norm in steps:
            x = add_norm(sublayer(x), x, dropout, norm)
        return Stream(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = applied(self.linear1, x)  # with its bias, which a matrix product adds for nothing
        return applied(self.linear2, activated(hidden, self.activation, self.dropout))

    def takes_packed(self) -> bool:
        """Whether the layer computes the same from a packed batch: its parts do, and know nothing of the shape."""
        return known_activation(self.activation) is not None and position_wise(
            *(getattr(self, name) for name in self.parts)
        )


@stands_in
class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """Drop-in for torch.nn.TransformerEncoderLayer: constructor, initial values, forward and state_dict are torch's.

        x = norm1(x + dropout1(self_attn(x)))                   post-norm (default)
        x = norm2(x + dropout2(linear2(dropout(activation(linear1(x))))))

        x = x + dropout1(self_attn(norm1(x)))                   pre-norm (norm_first=True)
        x = x + dropout2(linear2(dropout(activation(linear1(norm2(x))))))

    Each sum, dropout and norm is one pass over memory, and so are the activation and its dropout, if it is ReLU or GELU
    (others run as they are). What differs from torch's:

    - train, eval and no_grad compute the same, as there is no second path for inference. Every submodule that has hooks
      or was replaced (LoRA, quantised, another norm) is called, in every mode.
    - A row with nothing to attend to is no NaN; see `MultiheadAttention`.
    - is_causal=True is a mask in itself: it needs no src_mask, and beside one that allows more it still holds.
    - return_attention=True returns (output, weights) with each head's weights, (N, H, S, S).

    Rows that src_key_padding_mask hides are computed like the others, as in torch's training mode.
    """

    parts = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        super().__init__(*sizes, batch_first, norm_first, bias, device, dtype)
        self._adopt_parts()

    def forward(
        self,
        src: Tensor | Stream,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        return_attention: bool = False,
        keys: Keys | None = None,
    ):
        """src (N, S, E) if batch_first, else (S, N, E), or unbatched (S, E), to the same shape.

        Args:
            src_mask: (S, S) or (N·H, S, S). bool: True = ignore. float: added to the scores; has a gradient.
            src_key_padding_mask: (N, S), unbatched (S). bool: True = ignore this key. float: added to its scores.
            is_causal: row i sees rows 0 ... i only.
            return_attention: return the weights too; see above.
            keys: what a stack passes in place of the masks; then (Stream, weights) comes out.
        """
        if keys is not None:
            return self._run(src if isinstance(src, Stream) else Stream(src), keys, return_attention)
        assert isinstance(src, Tensor)
        if src.is_nested:
            return self._run_nested(src, src_mask, src_key_padding_mask, is_causal, return_attention)
        keys = settled(self.self_attn, Keys(src_mask, src_key_padding_mask, is_causal), src, src)
        stream, weights = self._run(Stream(src), keys, return_attention)
        return (stream.total(), weights) if return_attention else stream.total()

    def _run(self, stream: Stream, keys: Keys, wants_weights: bool) -> tuple[Stream, Tensor | None]:
        weights = None

        def attend(x: Tensor) -> Tensor:
            nonlocal weights
            out, weights = keys.attend(self.self_attn, x, x, wants_weights)
            return out

        steps = ((attend, self.dropout1, self.norm1), (self._feed_forward, self.dropout2, self.norm2))
        return self._through(steps, stream), weights

    def _run_nested(self, src, src_mask, src_key_padding_mask, is_causal, return_attention):
        """A nested tensor is a packed batch: what torch.nn.TransformerEncoder makes of a padded one in eval mode."""
        masked = src_mask is not None or src_key_padding_mask is not None
        if masked or return_attention or not self.takes_packed():
            raise ValueError(
                "nested tensors are supported without masks (but is_causal) and return_attention, by layers whose "
                "parts are torch.nn's or ours; pass a padded tensor and src_key_padding_mask instead"
            )
        return run_nested(src, is_causal, lambda stream, keys: self._run(stream, keys, False)[0].total())


@stands_in
class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """Drop-in for torch.nn.TransformerDecoderLayer: constructor, initial values, forward and state_dict are torch's.

        x = norm1(x + dropout1(self_attn(x)))                   post-norm (default)
        x = norm2(x + dropout2(multihead_attn(x, memory)))
        x = norm3(x + dropout3(linear2(dropout(activation(linear1(x))))))

        x = x + dropout1(self_attn(norm1(x)))                   pre-norm (norm_first=True), and so on

    What is fused and what differs: as `TransformerEncoderLayer`. return_attention=True returns (output, (weights of
    self_attn, weights of multihead_attn)), each head's: (N, H, T, T) and (N, H, T, S). And an activation that is a
    module (nn.GELU()) is in the layer's copies too, of which a TransformerDecoder is made; torch's copies compute ReLU.
    """

    parts = (
        *("self_attn", "multihead_attn", "linear1", "dropout", "linear2"),
        *("norm1", "norm2", "norm3", "dropout1", "dropout2", "dropout3"),
    )

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        super().__init__(*sizes, batch_first, norm_first, bias, device, dtype)
        self._adopt_parts()

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)  # torch's would make a ReLU of an activation that is a module
        if not hasattr(self, "activation"):  # a pickle from before there were others
            self.activation = F.relu

    def forward(
        self,
        tgt: Tensor | Stream,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        return_attention: bool = False,
        keys: tuple[Keys, Keys] | None = None,
    ):
        """tgt (N, T, E), memory (N, S, E) if batch_first, else (T, N, E), (S, N, E), or unbatched, to tgt's shape.

        Args:
            tgt_mask, memory_mask: (T, T) and (T, S), or (N·H, T, T) and (N·H, T, S). bool: True = ignore. float: added
                to the scores; has a gradient.
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), unbatched (T) and (S). bool: True = ignore
                this key. float: added to its scores.
            tgt_is_causal, memory_is_causal: row i sees keys 0 ... i only.
            return_attention: return the weights too; see above.
            keys: what a stack passes in place of the masks; then (Stream, weights) comes out.
        """
        if keys is not None:
            return self._run(tgt if isinstance(tgt, Stream) else Stream(tgt), memory, *keys, return_attention)
        assert isinstance(tgt, Tensor)
        own = settled(self.self_attn, Keys(tgt_mask, tgt_key_padding_mask, tgt_is_causal), tgt, tgt)
        of_memory = Keys(memory_mask, memory_key_padding_mask, memory_is_causal)
        of_memory = settled(self.multihead_attn, of_memory, tgt, memory)
        stream, weights = self._run(Stream(tgt), memory, own, of_memory, return_attention)
        return (stream.total(), weights) if return_attention else stream.total()

    def _run(
        self, stream: Stream, memory: Tensor, own: Keys, of_memory: Keys, wants_weights: bool
    ) -> tuple[Stream, tuple[Tensor | None, ...]]:
        weights: list[Tensor | None] = []

        def attend(x: Tensor) -> Tensor:
            out, seen = own.attend(self.self_attn, x, x, wants_weights)
            weights.append(seen)
            return out

        def attend_to_memory(x: Tensor) -> Tensor:
            out, seen = of_memory.attend(self.multihead_attn, x, memory, wants_weights)
            weights.append(seen)
            return out

        steps = (
            (attend, self.dropout1, self.norm1),
            (attend_to_memory, self.dropout2, self.norm2),
            (self._feed_forward, self.dropout3, self.norm3),
        )
        return self._through(steps, stream), tuple(weights)


def settled(attention: nn.Module, keys: Keys, queries: Tensor, memory: Tensor) -> Keys:
    """`Keys.settled` for an attention that is ours; others take torch.nn's masks as they are."""
    if keys.packable or not plain(attention, MultiheadAttention):  # no masks, or another's business
        return keys
    if queries.dim() != 3:
        return keys.settled(None, queries.shape[0], memory.shape[0])
    batch_axis = 0 if attention.batch_first else 1
    return keys.settled(queries.shape[batch_axis], queries.shape[1 - batch_axis], memory.shape[1 - batch_axis])
