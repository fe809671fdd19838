"""Whether a Transformer still is what its configuration says: for those who compute from its weights in other ways.

Any module of a model can be changed or replaced once the model is built, and the model then computes what that module
does. Who reads weights and the configuration instead, to pack them or to write them for another program, would make
another model of them without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fused_transformer.add_norm import AddLayerNorm
from fused_transformer.attention import MultiheadAttention
from fused_transformer.config import TransformerConfig
from fused_transformer.embedding import TokenEmbedding
from fused_transformer.feed_forward import FeedForward
from fused_transformer.layers import DecoderLayer, EncoderLayer
from fused_transformer.model import Decoder, Encoder, Transformer
from fused_transformer.plain import LINEARS

# What decoding calls, and whoever reads the weights instead computes in another way. (forward is not among it.)
COMPUTED_BY = ("encode", "decode", "start", "step", "project")
STACKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "encoder": (Encoder, EncoderLayer),
    "decoder": (Decoder, DecoderLayer),
}


def what_changed(model: Transformer) -> str | None:
    """The first part of `model` that its configuration does not describe, by its name; None: there is none.

    What whoever reads the weights sees does not count: depth, width of the feed-forward networks, biases that are not
    there, one eps for all norms (`norm_eps`), and norms and a bias that other libraries' models have (`extra_parts`).
    Nor do dropout, parametrizations, whose weights are what is read, and hooks, of which most only look on.
    """
    return next(_changes(model), None)


def norm_eps(model: Transformer) -> float:
    """What all its norms add to the variance; `what_changed` tells where it is not one number."""
    return next(_epsilons(model), 1e-5)


def _epsilons(model: Transformer) -> Iterator[float]:
    """Of the stacks' norms: what else has been hung on the model is none of it."""
    for stack in (model.encoder, model.decoder):
        yield from (module.eps for module in stack.modules() if isinstance(module, nn.LayerNorm))


def _changes(model: Transformer) -> Iterator[str]:
    """Lazily: what is of another class than it was is not looked into."""
    for name in COMPUTED_BY:
        if name in model.__dict__ or getattr(type(model), name) is not getattr(Transformer, name):
            yield f"another {name}()"
    for name in ("source_embedding", "target_embedding"):
        if getattr(model, name) is not None:
            yield from _differences(getattr(model, name), name, (TokenEmbedding,))
    for name, (stack_kind, layer_kind) in STACKS.items():
        stack: Any = getattr(model, name)
        yield from _differences(stack, name, (stack_kind,))
        for index, layer in enumerate(stack.layers):
            yield from _layer_changes(layer, layer_kind, f"{name}.layers.{index}", model.config)
        if stack.norm is not None:
            yield from _differences(stack.norm, f"{name}.norm", (AddLayerNorm,))
        elif model.config.norm_first:
            yield f"{name}.norm None, with which a pre-norm stack ends"
    if model.output_projection is not None:
        yield from _differences(model.output_projection, "output_projection", LINEARS)
    epsilons = sorted({*_epsilons(model)})
    if len(epsilons) > 1:
        yield f"norms that differ in eps ({', '.join(map(str, epsilons))})"


def _layer_changes(layer: Any, kind: type[nn.Module], where: str, config: TransformerConfig) -> Iterator[str]:
    yield from _differences(layer, where, (kind,), norm_first=config.norm_first)
    for name in layer.attentions:
        attention = getattr(layer, name)
        heads = {"num_heads": config.num_heads, "head_dim": config.d_model // config.num_heads, "batch_first": True}
        yield from _differences(attention, f"{where}.{name}", (MultiheadAttention,), **heads)
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            yield f"{where}.{name} with kdim, vdim, add_bias_kv or add_zero_attn"
        yield from _differences(attention.out_proj, f"{where}.{name}.out_proj", LINEARS)
    inner = layer.feed_forward
    yield from _differences(inner, f"{where}.feed_forward", (FeedForward,), activation=config.activation)
    for name in ("linear1", "linear2"):
        yield from _differences(getattr(inner, name), f"{where}.feed_forward.{name}", LINEARS)
    for name in layer.norms:
        yield from _differences(getattr(layer, name), f"{where}.{name}", (AddLayerNorm,))


def _differences(module: nn.Module, where: str, kinds: tuple[type[nn.Module], ...], **built: Any) -> Iterator[str]:
    """A module of another class, or whose attributes are not what they were built as."""
    module = getattr(module, "_orig_mod", module)  # of a compiled one
    kind = type_before_parametrizations(module)
    if kind not in kinds:
        got, want = (f"{x.__module__}.{x.__qualname__}" for x in (kind, kinds[0]))  # torch's and ours share names
        yield f"{where} of class {got}, and not {want}"
    if "forward" in module.__dict__:
        yield f"{where} whose forward was replaced"
    for name, value in built.items():
        if getattr(module, name) != value:
            yield f"{where} with {name} {getattr(module, name)!r}, where the configuration has {value!r}"
