"""Attention maps: which tokens each head of a model attends to, of one sentence and its translation.

The model reads the translation as in training, each position the tokens up to itself, so that the weights are those by
which the next token was chosen. They come from the fused kernels: attention and its log-sum-exp, then the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fused_transformer.decoding import evaluating, generate
from fused_transformer.graphed import GraphedTransformer
from fused_transformer.hypotheses import Hypotheses
from fused_transformer.inference import PackedTransformer
from fused_transformer.inference_maps import packed_weights

if TYPE_CHECKING:
    from fused_transformer.config import TransformerConfig
    from fused_transformer.decoding import Model
    from fused_transformer.model import Transformer

# Each kind of attention, and tensor2tensor's name for it.
KINDS = {
    "encoder_self": "Input - Input",
    "encoder_decoder": "Input - Output",
    "decoder_self": "Output - Output",
}
Labels = Callable[[list[int]], Sequence[str]]


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention weights of one sentence and its translation; a row is a query, a column a key.

    Row i of the decoder's maps reads target[0] ... target[i] and writes target[i + 1].

    Attributes:
        source: S labels, one a token.
        target: T + 1 labels: the translation from bos to the last token that was written, which is eos or the limit's.
        encoder_self: (layers, H, S, S), how the source attends to itself.
        encoder_decoder: (layers, H, T, S), how the translation attends to the source.
        decoder_self: (layers, H, T, T), how the translation attends to itself.

    Made by `attention_maps` and `Translator.translate(..., return_attention=True)`, or by hand from the weights that
    another model returns; a kind that it lacks is None.

    Raises:
        ValueError: labels and weights do not fit together, or there are no weights.
    """

    source: Sequence[str] = ()
    target: Sequence[str] = ()
    encoder_self: Tensor | None = None
    encoder_decoder: Tensor | None = None
    decoder_self: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        if not self.kinds:
            raise ValueError(f"attention maps need the weights of one kind at least: {', '.join(KINDS)}")
        for kind in self.kinds:
            weights, expected = self.weights(kind), (len(self.rows(kind)), len(self.columns(kind)))
            if weights.dim() != 4 or tuple(weights.shape[2:]) != expected or 0 in weights.shape:
                labels = f"{len(self.source)} source and {len(self.target)} target labels"
                raise ValueError(
                    f"{kind} must be (layers, heads, {expected[0]}, {expected[1]}) for {labels}, "
                    f"got {tuple(weights.shape)}"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of attention that there are, in the order of tensor2tensor's menu."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    def weights(self, kind: str) -> Tensor:
        """(layers, H, rows, columns) of this kind.

        Raises:
            ValueError: there is no such kind, or these maps have none of it.
        """
        if kind not in KINDS or getattr(self, kind) is None:
            raise ValueError(f"attention must be one of {', '.join(map(repr, self.kinds))}, got {kind!r}")
        return getattr(self, kind)

    def rows(self, kind: str) -> Sequence[str]:
        """Labels of this kind's queries: the source, or the tokens that were being written."""
        return self.source if kind == "encoder_self" else self.target[1:]

    def columns(self, kind: str) -> Sequence[str]:
        """Labels of this kind's keys: the source, or the tokens that had been read."""
        return self.target[:-1] if kind == "decoder_self" else self.source

    def to_bertviz(self) -> dict[str, Any]:
        """The arguments of bertviz's views: `bertviz.head_view(**maps.to_bertviz())`, `model_view` likewise.

        Of each kind a list with (1, H, rows, columns) for each layer. bertviz has one list of labels for the decoder:
        the tokens read, bos first.
        """
        names = {"encoder_self": "encoder_attention", "encoder_decoder": "cross_attention"}
        names["decoder_self"] = "decoder_attention"
        if len(self.kinds) == 1 and self.kinds[0] != "encoder_decoder":  # what it calls a self-attention model
            (kind,) = self.kinds
            return {"attention": self._layers(kind), "tokens": list(self.columns(kind))}
        arguments: dict[str, Any] = {names[kind]: self._layers(kind) for kind in self.kinds}
        return arguments | {"encoder_tokens": list(self.source), "decoder_tokens": list(self.target[:-1])}

    def _layers(self, kind: str) -> list[Tensor]:
        return [layer[None] for layer in self.weights(kind)]

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{f.name} {tuple(x.shape)}" for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)
        )
        return f"AttentionMaps({len(self.source)} source and {len(self.target)} target labels, {shapes})"


def attention_maps(
    model: Model,
    source: Tensor,
    target: Tensor | Hypotheses | None = None,
    *,
    source_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    labels: Labels | None = None,
) -> AttentionMaps | list[AttentionMaps]:
    """How a model attends while it translates each source to its target.

        weights = softmax(scale · q kᵀ, masked)        of each layer and head, in evaluation mode: without dropout

    Args:
        model: a Transformer, or one packed for translation; left in the mode it was in.
        source: (B, S) int64, right-padded with the model's padding_idx; or (S,), one sentence.
        target: (B, L) int64, from bos to eos (or to the last token written, if it ends without), right-padded; or (L,).
            Or what `generate` found, whose best hypotheses are taken. None: the model translates, by beam search with
            the paper's options.
        source_lengths, target_lengths: (B,) int64; None: counted from the padding.
        labels: from token numbers to labels, such as `tokenizer.pieces`; None: the numbers.

    Returns:
        For (B, S) a list of B AttentionMaps, of real tokens alone; for (S,) the one. The weights are float32, on the
        CPU. A sentence's weights do not depend on the others of its batch (but for the rounding of matrix products).

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, a source is empty, or a target has fewer than
            two tokens or does not begin with bos.
    """
    single = isinstance(source, Tensor) and source.dim() == 1
    source = _batched("source", source)
    if source_lengths is None:
        source_lengths = model.lengths(source)
    if isinstance(target, Tensor):
        if single != (target.dim() == 1):
            shapes = f"{tuple(source.shape[single:])} and {tuple(target.shape)}"
            raise ValueError(f"source and target must both be batches or both be one sentence, got {shapes}")
        target = _batched("target", target)
        target_lengths = model.lengths(target) if target_lengths is None else target_lengths
    else:
        found = generate(model, source, source_lengths) if target is None else target
        target, target_lengths = (x[:, 0] for x in targets_of(found, model.config))
    target_lengths = target_lengths - 1  # the last one is written, and not read
    _check(model, source, target, source_lengths, target_lengths)
    arguments = (source, source_lengths, target[:, :-1], target_lengths)
    with torch.no_grad(), evaluating(model):
        if isinstance(model, PackedTransformer):
            recorded = packed_weights(model, *arguments)
        else:
            recorded = _weights(model.model if isinstance(model, GraphedTransformer) else model, *arguments)
    stacked = {
        kind: torch.stack([x.float().cpu() for x in layers]) if layers else None
        for kind, layers in zip(KINDS, recorded, strict=True)
    }
    maps = [
        _of_sentence(stacked, row, s, t, source[row].tolist(), target[row].tolist(), labels)
        for row, (s, t) in enumerate(zip(source_lengths.tolist(), target_lengths.tolist(), strict=True))
    ]
    return maps[0] if single else maps


def targets_of(found: Hypotheses, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Each hypothesis from bos to eos, or to its last token if it did not finish: (B, N, T + 2), and lengths (B, N)."""
    if not isinstance(found, Hypotheses):
        raise TypeError(f"target must be a torch.Tensor, Hypotheses or None, got {type(found).__name__}")
    column = torch.full_like(found.lengths, config.padding_idx)[..., None]
    target = torch.cat([torch.full_like(column, config.bos_idx), found.tokens, column], -1)
    end = torch.where(found.finished, config.eos_idx, config.padding_idx)[..., None]
    return target.scatter(-1, found.lengths[..., None] + 1, end), found.lengths + 1 + found.finished


def _batched(name: str, tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of token numbers, got {type(tokens).__name__}")
    if tokens.dim() not in (1, 2):
        raise ValueError(f"{name} must be (B, length), or (length,) of one sentence, got {tuple(tokens.shape)}")
    return tokens if tokens.dim() == 2 else tokens[None]


def _check(model: Model, source: Tensor, target: Tensor, source_lengths: Tensor, target_lengths: Tensor) -> None:
    if source_lengths.shape != source.shape[:1] or target_lengths.shape != target.shape[:1]:
        raise ValueError(f"lengths must be ({len(source)},) and ({len(target)},), one for each sentence")
    if len(source) != len(target):
        raise ValueError(f"there must be a target for each of {len(source)} sources, got {len(target)}")
    if (source_lengths < 1).any():
        raise ValueError(f"source {int((source_lengths < 1).nonzero()[0])} has no tokens")
    if (target_lengths < 1).any():
        row = int((target_lengths < 1).nonzero()[0])
        raise ValueError(f"target {row} must have bos and a token at least, got {int(target_lengths[row]) + 1} tokens")
    if (target[:, 0] != model.config.bos_idx).any():
        row = int((target[:, 0] != model.config.bos_idx).nonzero()[0])
        raise ValueError(f"target {row} must begin with bos ({model.config.bos_idx}), got {int(target[row, 0])}")


def _of_sentence(
    stacked: dict[str, Tensor | None],
    row: int,
    s: int,
    t: int,
    source: list[int],
    target: list[int],
    labels: Labels | None,
) -> AttentionMaps:
    sizes = {"encoder_self": (s, s), "encoder_decoder": (t, s), "decoder_self": (t, t)}
    # Copies, lest one sentence's maps keep the whole batch's in memory.
    cut = {
        kind: None if x is None else x[:, row, :, : sizes[kind][0], : sizes[kind][1]].clone()
        for kind, x in stacked.items()
    }
    name = labels or (lambda tokens: [str(token) for token in tokens])
    return AttentionMaps(name(source[:s]), name(target[: t + 1]), **cut)


def _weights(
    model: Transformer, source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Each layer's weights (B, H, rows, columns), of the kinds in the order of KINDS."""
    encoder, decoder = list(model.encoder.layers), list(model.decoder.layers)
    with (
        _recording([cast(Any, layer).self_attn for layer in encoder]) as encoder_self,
        _recording([cast(Any, layer).multihead_attn for layer in decoder]) as encoder_decoder,
        _recording([cast(Any, layer).self_attn for layer in decoder]) as decoder_self,
    ):
        # Layer by layer: the stacks themselves would leave the padding out, and packed batches have no weights.
        memory = _through(model.encoder, (model.source_embedding(source),), lengths=source_lengths)
        x = model._embed_target(target)
        _through(model.decoder, (x, memory), lengths=target_lengths, memory_lengths=source_lengths)
    return encoder_self, encoder_decoder, decoder_self


def _through(stack: nn.Module, inputs: tuple[Tensor, ...], **options: Tensor) -> Tensor:
    (x, *memory), residual = inputs, None
    for layer in cast(Any, stack.layers):
        x, residual = layer(x, *memory, **options, residual=residual, chained=True)
    return x if stack.norm is None else cast(Any, stack.norm)(x, residual)


@contextmanager
def _recording(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the block these MultiheadAttentions leave each head's weights in the list, one call after the other."""
    weights: list[Tensor] = []

    def ask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    def note(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        weights.append(output[1])

    hooks = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(note) for module in modules]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
