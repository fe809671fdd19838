"""A Transformer for translation on the CPU: its weights packed once, a decoding step one native call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from fused_transformer import guessing
from fused_transformer.as_configured import norm_eps, what_changed
from fused_transformer.attention import MultiheadAttention
from fused_transformer.config import TransformerConfig
from fused_transformer.embedding import TokenEmbedding
from fused_transformer.incremental import DecoderState, new_state
from fused_transformer.kernels import attention, layer_norm
from fused_transformer.kernels.decoder_step import (
    Memory,
    Norm,
    PackedDecoder,
    PackedLayer,
    TokenTable,
    decoder_step,
    memory_of,
)
from fused_transformer.kernels.decoder_step.ahead import Ahead, Histories, step_ahead
from fused_transformer.kernels.linear import WEIGHTS, PackedLinear, linear
from fused_transformer.kernels.linear_argmax import ScreenedLinear, linear_argmax
from fused_transformer.layers import DecoderLayer, EncoderLayer
from fused_transformer.masks import real_lengths, require_rows
from fused_transformer.model import Transformer
from fused_transformer.packing import packing_if_worth_it

LEAST_SCREENED = 2**21  # numbers of a vocabulary's weights: fewer are read from the cache
WIDEST_HEAD = 256  # that csrc/decode_attention has room for

P = ParamSpec("P")
T = TypeVar("T")


def why_not(model: Transformer) -> str | None:
    """Why `model` can't be packed, in a sentence; None: it can."""
    changed = what_changed(model)
    if changed is not None:
        return f"a model is packed as its configuration says, and this one has {changed}"
    device = model.source_embedding.weight.device
    if device.type != "cpu":
        return f"packed weights are for the CPU, and the model is on {device}: model.cpu() moves it"
    if len(model.decoder.layers) == 0:
        return "a model without decoder layers has nothing to pack for decoding"
    width = model.config.d_model // model.config.num_heads
    if width > WIDEST_HEAD:
        return f"heads can be up to {WIDEST_HEAD} wide to be packed, and the model's are {width} (d_model / num_heads)"
    return None


def in_float32(method: Callable[P, T]) -> Callable[P, T]:
    """Without gradients, and as outside of torch.autocast: packed weights take float32 and give it."""

    @torch.no_grad()
    @wraps(method)
    def run(*args: P.args, **options: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():  # nearly always, and a step has no time to spare
            return method(*args, **options)
        with torch.autocast("cpu", enabled=False):
            return method(*args, **options)

    return run


class PackedTransformer:
    """A trained `Transformer` packed for translation: `generate`, `greedy` and `beam_search` take it for the model.

    A copy: what happens to the model later does not reach it, and it is read-only. Activations, keys, values and sums
    are float32 whatever the weights, under torch.autocast too. It only decodes: there is no training mode, and no
    gradient. Copies of it share its weights; it can't be pickled.

    Args:
        model: on the CPU, of any float dtype.
        weights: how the matrices are kept, see `PackedLinear`: "float32" (the model's own numbers), "bfloat16" (half
            the memory to read) or "int8" (a quarter; inputs are rounded to 255 levels too). Embeddings, norms and
            biases stay float32.
        look_ahead: with float32 weights and a large vocabulary, let an int8 copy of the decoder guess what comes next
            where few sentences are translated, and so compute several tokens with one reading of the weights (see
            `lookahead.py`); results are the same to the bit. The copy takes a quarter of the decoder's memory, and is
            made when it is first of use.

    Attributes:
        config, weights, look_ahead: as given.
        nbytes: of all packed weights.

    Raises:
        TypeError, ValueError: not a Transformer, not on the CPU, without decoder layers, with heads more than 256 wide
            or parts that its configuration does not describe (see `why_not`), or `weights` is unknown.
    """

    def __init__(self, model: Transformer, *, weights: str = "float32", look_ahead: bool = True) -> None:
        if not isinstance(model, Transformer):
            raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
        reason = why_not(model)
        if reason is not None:
            raise ValueError(reason)
        self.config: TransformerConfig = model.config
        self.weights, self.look_ahead = weights, look_ahead
        self.training = False
        config = model.config
        self._heads, self._eps = config.num_heads, norm_eps(model)
        self._source = _embedding(model.source_embedding)
        self._target = self._source if model.target_embedding is None else _embedding(model.target_embedding)
        self._target_table = TokenTable(self._target.weight.detach(), self._target.positions, self._target.padding_idx)
        self._encoder = [self._encoder_layer(cast(EncoderLayer, layer)) for layer in model.encoder.layers]
        self._encoder_norm = None if model.encoder.norm is None else _norm(model.encoder.norm)
        layers = cast("list[DecoderLayer]", list(model.decoder.layers))
        self._decoder = PackedDecoder(
            [self._decoder_layer(layer) for layer in layers],
            config.num_heads,
            norm_first=config.norm_first,
            eps=self._eps,
            activation=config.activation,
            final_norm=None if model.decoder.norm is None else _norm(model.decoder.norm),
        )
        self._memory = self._memory_projection([layer.multihead_attn for layer in layers])
        projection = model.output_projection
        table = self._target.weight if projection is None else projection.weight
        self._output = self._pack(table, None if projection is None else projection.bias)
        self._screened = _screened(self._output)

    @property
    def nbytes(self) -> int:
        encoder = sum(x.nbytes for layer in self._encoder for x in layer[:4])
        screen = 0 if self._screened is None else self._screened.nbytes
        draft = self.__dict__.get("draft")  # if it has been made
        beside = screen + (0 if draft is None else draft.decoder.nbytes)
        return encoder + self._decoder.nbytes + self._memory.nbytes + self._output.nbytes + beside

    def __copy__(self) -> PackedTransformer:
        """A copy with the same parts: what is read-only needs to be in memory once."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict) -> PackedTransformer:
        return self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("packed weights can't be pickled: save the Transformer, and pack it again where it is loaded")

    def eval(self) -> PackedTransformer:
        """Nothing: it has no other mode."""
        return self

    def train(self, mode: bool = True) -> PackedTransformer:
        """Nothing if mode is False.

        Raises:
            ValueError: mode is True.
        """
        if mode:
            raise ValueError("packed weights are read-only: train the Transformer that they were packed from")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The tables of embeddings, for their device and dtype: the matrices are packed."""
        yield self._source.weight
        if self._target is not self._source:
            yield self._target.weight

    def lengths(self, tokens: Tensor) -> Tensor:
        """As `Transformer.lengths`."""
        return real_lengths(tokens, self.config.padding_idx)

    @in_float32
    def encode(self, source_tokens: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """As `Transformer.encode`."""
        require_rows("source_tokens", source_tokens)
        if source_lengths is None:
            source_lengths = self.lengths(source_tokens)
        x = self._source(source_tokens)
        shape, width = x.shape, x.shape[2] // self._heads
        packing = packing_if_worth_it(source_lengths, x)
        x = x.flatten(0, 1) if packing is None else packing.pack(x)
        for qkv, out, up, down, first, second in self._encoder:

            def attend(y: Tensor, qkv=qkv) -> Tensor:
                parts = linear(y, qkv)
                if packing is not None:
                    q, k, v = parts.view(len(y), 3, self._heads, width).unbind(1)
                    return attention(q, k, v, q_offsets=packing.offsets).flatten(1)
                q, k, v = parts.view(*shape[:2], 3, self._heads, width).permute(2, 0, 3, 1, 4)
                return attention(q, k, v, k_lengths=source_lengths).transpose(1, 2).reshape(y.shape)

            x = self._sublayer(x, first, attend, out)
            x = self._sublayer(x, second, lambda y, up=up: linear(y, up, activation=self.config.activation), down)
        if self._encoder_norm is not None:
            x = self._normalised(x, self._encoder_norm)
        return x.view(shape) if packing is None else packing.unpack(x)

    @in_float32
    def start(self, memory: Tensor, memory_lengths: Tensor | None = None, *, beam_size: int = 1) -> DecoderState:
        """As `Transformer.start`."""
        packing = packing_if_worth_it(memory_lengths, memory)
        rows = memory.flatten(0, 1) if packing is None else packing.pack(memory)
        offsets = None if packing is None else packing.offsets
        projected = memory_of(rows, self._memory, self._heads, memory.shape[0], memory.shape[1], offsets)
        return new_state(projected, memory, memory_lengths, beam_size)

    @in_float32
    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """As `Transformer.step`."""
        state.make_room()
        hidden = decoder_step(
            tokens,
            self._decoder,
            state.cache,
            state.length,
            state.memory,
            ancestors=state.ancestors,
            memory_lengths=state.memory_lengths,
            sources=state.sources,
            beams=state.beam_size,
            table=self._target_table,
        )
        state.length += 1
        return hidden

    @in_float32
    def step_ahead(
        self,
        tokens: list[int],
        state: DecoderState,
        position: int,
        *,
        batch: int,
        slots: int,
        levels: int,
        width: int,
        histories: Histories | None,
        scores: Tensor | None,
    ) -> Ahead:
        """Hypotheses at `position`, and what the draft guesses beyond; see `kernels/decoder_step/ahead.py`."""
        assert self.draft is not None
        return step_ahead(
            tokens,
            self._target_table,
            self._decoder,
            state.cache,
            position,
            cast("Memory", state.memory),
            batch=batch,
            slots=slots,
            draft=self.draft,
            levels=levels,
            width=width,
            histories=histories,
            scores=scores,
            memory_lengths=state.memory_lengths,
            sources=state.sources,
        )

    @cached_property
    def draft(self) -> guessing.Draft | None:
        """Its decoder in int8, to guess what it will say; None where that is no gain. Made when first asked for."""
        if not self.look_ahead or self._screened is None or self._screened.rounded is None:
            return None
        try:
            rounded = self._decoder.rounded("int8")
        except ValueError:  # a weight that is not finite, or a width beyond it, has no int8 form
            return None
        return guessing.Draft.of(rounded, self._screened.rounded, self.config.eos_idx)

    @in_float32
    def project(self, hidden: Tensor) -> Tensor:
        """As `Transformer.project`."""
        return linear(hidden, self._output)

    @in_float32
    def likeliest(self, hidden: Tensor, *, scores: bool = True) -> tuple[Tensor, Tensor] | None:
        """The largest logit of hidden states (N, E) and its token, (N,) each: those of `project(hidden).max(-1)`.

        None where nothing is gained by asking for less than all logits: many rows, or a small vocabulary.

        Args:
            hidden: float32.
            scores: whether all their logits will be asked for as well, later and with others', which is then a gain
                only for so few rows that the weights' memory is what takes the time.
        """
        if self._screened is None:
            return None
        most = guessing.MOST_GREEDY_ROWS if scores else self._screened.most_rows
        return linear_argmax(hidden, self._screened) if len(hidden) <= most else None

    # ---------------------------------------------------------------- packing

    def _pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(weight.detach(), None if bias is None else bias.detach(), weights=self.weights)

    def _linear(self, module: nn.Linear) -> PackedLinear:
        return self._pack(module.weight, module.bias)

    def _encoder_layer(self, layer: EncoderLayer) -> tuple:
        attn, inner = layer.self_attn, layer.feed_forward
        return (
            *(self._pack(attn.in_proj_weight, attn.in_proj_bias), self._linear(attn.out_proj)),
            *(self._linear(inner.linear1), self._linear(inner.linear2)),
            *(_norm(layer.norm1), _norm(layer.norm2)),
        )

    def _decoder_layer(self, layer: DecoderLayer) -> PackedLayer:
        attn, cross, width = layer.self_attn, layer.multihead_attn, self.config.d_model
        bias = None if cross.in_proj_bias is None else cross.in_proj_bias[:width]
        norms = (_norm(layer.norm1), _norm(layer.norm2), _norm(layer.norm3))
        return PackedLayer(
            qkv=self._pack(attn.in_proj_weight, attn.in_proj_bias),
            self_out=self._linear(attn.out_proj),
            query=self._pack(cross.in_proj_weight[:width], bias),
            memory_out=self._linear(cross.out_proj),
            up=self._linear(layer.feed_forward.linear1),
            down=self._linear(layer.feed_forward.linear2),
            norms=norms,
        )

    def _memory_projection(self, attentions: list[MultiheadAttention]) -> PackedLinear:
        """Of all layers, so that one product makes their keys and values."""
        width = self.config.d_model
        weight = torch.cat([attn.in_proj_weight[width:] for attn in attentions])
        biases = [attn.in_proj_bias for attn in attentions]
        if all(bias is None for bias in biases):
            return self._pack(weight, None)
        return self._pack(weight, torch.cat([weight.new_zeros(2 * width) if x is None else x[width:] for x in biases]))

    # ---------------------------------------------------------------- the encoder's layers

    def _normalised(self, x: Tensor, norm: Norm) -> Tensor:
        return layer_norm(x, norm.weight, norm.bias, eps=self._eps)

    def _sublayer(self, x: Tensor, norm: Norm, inner, last: PackedLinear) -> Tensor:
        if self.config.norm_first:
            return linear(inner(self._normalised(x, norm)), last, residual=x)
        return self._normalised(linear(inner(x), last, residual=x), norm)


def _screened(output: PackedLinear) -> ScreenedLinear | None:
    """None where it would be no gain; and where a weight is not finite, which has no int8 form."""
    if output.weights != "float32" or output.out_features * output.in_features < LEAST_SCREENED:
        return None
    try:
        return ScreenedLinear(output)
    except ValueError:
        return None


def _norm(module: Any) -> Norm:
    """A copy of a LayerNorm's parameters in float32."""
    parameters = (None if x is None else x.detach().float().clone().contiguous() for x in (module.weight, module.bias))
    return Norm(*parameters)


def _embedding(module: TokenEmbedding) -> TokenEmbedding:
    """A copy in float32, without dropout."""
    vocab_size, width = module.weight.shape
    with torch.device("meta"):  # its initial weights would be drawn for nothing
        copy = TokenEmbedding(vocab_size, width, positions=module.positions, padding_idx=module.padding_idx)
    weight = module.weight.detach().float().clone(memory_format=torch.contiguous_format)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    return copy.eval()
