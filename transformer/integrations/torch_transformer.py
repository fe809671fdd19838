"""torch.nn.Transformer, with the embeddings and the projection around it, as a Transformer of this package."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.config import TransformerConfig
from fused_transformer.extra_parts import with_weights
from fused_transformer.model import Transformer
from fused_transformer.nn import TransformerDecoderLayer, TransformerEncoderLayer

STACKS = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}
LAYERS = {
    "encoder": (nn.TransformerEncoderLayer, TransformerEncoderLayer),
    "decoder": (nn.TransformerDecoderLayer, TransformerDecoderLayer),
}
ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}  # theirs: ours
ACTIVATION_MODULES = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}


def from_torch(
    transformer: nn.Transformer,
    source_embedding: nn.Embedding,
    target_embedding: nn.Embedding | None = None,
    generator: nn.Linear | None = None,
    *,
    positions: str | None,
    padding_idx: int,
    bos_idx: int,
    eos_idx: int,
    embedding_scale: float | None = None,
) -> Transformer:
    """The same model in ours, with KV cache, beam search and checkpoints: its logits are theirs, but for rounding.

        memory = transformer.encoder(embedding_scale · source_embedding(source) + PE)
        logits = generator(transformer.decoder(embedding_scale · target_embedding(target) + PE, memory))

    What stays one module there, or one Parameter, stays one table here where embedding_scale is √E and the generator
    has no bias. Weights are copied.

    Args:
        transformer: torch.nn's or `fused_transformer.nn`'s, pre-norm or post-norm (then with its final norms).
        source_embedding, target_embedding: (V, E) each; None: the source's.
        generator: the output projection, E to V; None: the target's table.
        positions: the table of positions that is added, see `TokenEmbedding`: "interleaved" is that of the paper and
            of PyTorch's tutorials. None: none is.
        padding_idx, bos_idx, eos_idx: the special tokens.
        embedding_scale: what embeddings are multiplied by, finite and not 0; None: √E, as in the paper. 1.0 where they
            are not.

    Returns:
        A Transformer in evaluation mode, in the dtype of `transformer` and on its device. Padding gets no embedding
        here; padding on the right, masked there, makes no difference.

    Raises:
        ValueError: a part that this package's model can't follow, which the sentence names, or embedding_scale is out
            of its range.
        TypeError: an argument is of another class.
    """
    for name, value, kind in (
        ("transformer", transformer, nn.Transformer),
        ("source_embedding", source_embedding, nn.Embedding),
        ("target_embedding", source_embedding if target_embedding is None else target_embedding, nn.Embedding),
        ("generator", nn.Linear(1, 1) if generator is None else generator, nn.Linear),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a torch.nn.{kind.__name__}, got {type(value).__name__}")
    if embedding_scale is not None:
        if isinstance(embedding_scale, (bool, str)) or not hasattr(embedding_scale, "__float__"):
            raise TypeError(f"embedding_scale must be a number, got {type(embedding_scale).__name__}")
        embedding_scale = float(embedding_scale)
        if embedding_scale == 0 or not math.isfinite(embedding_scale):
            raise ValueError(f"embedding_scale must be finite and not 0, got {embedding_scale}")
    target_embedding = source_embedding if target_embedding is None else target_embedding
    for name, module in (("source_embedding", source_embedding), ("target_embedding", target_embedding)):
        if module.max_norm is not None:
            raise ValueError(f"{name}.max_norm can't be followed: it changes the weights as they are read")

    options = _options(transformer)
    width = options["d_model"]
    ratio = 1.0 if embedding_scale is None else embedding_scale / math.sqrt(width)
    source, target = source_embedding.weight, target_embedding.weight
    projection = target if generator is None else generator.weight
    bias = None if generator is None else generator.bias
    for name, table in (("source_embedding", source), ("target_embedding", target), ("generator", projection)):
        if table.shape[1] != width:
            raise ValueError(f"{name} must have width {width}, the transformer's, got {table.shape[1]}")
    tie = "separate"
    if target is projection and bias is None and ratio == 1.0:
        tie = "shared" if source is target else "target"

    weights = {"source_embedding.weight": source * ratio}
    if tie != "shared":
        weights["target_embedding.weight"] = target * ratio
    if tie == "separate":
        weights["output_projection.weight"] = projection
        if bias is not None:
            weights["output_projection.bias"] = bias
    for stack in LAYERS:
        weights |= _stack_weights(getattr(transformer, stack), stack)
    config = TransformerConfig(
        source_vocab_size=len(source),
        target_vocab_size=len(target),
        positions=positions,
        tie_embeddings=tie,  # type: ignore[arg-type]
        padding_idx=padding_idx,
        bos_idx=bos_idx,
        eos_idx=eos_idx,
        **options,
    )
    try:
        return with_weights(config, {name: x.detach().clone() for name, x in weights.items()}).eval()
    except RuntimeError as error:
        raise ValueError(f"the weights do not make a Transformer: {error}") from None


def _options(transformer: nn.Transformer) -> dict[str, Any]:
    """What all layers have in common, as `TransformerConfig` names it."""
    found: dict[str, Any] = {}
    for stack, kind in STACKS.items():
        _require(getattr(transformer, stack), kind, f"transformer.{stack}")
        for index, layer in enumerate(getattr(transformer, stack).layers):
            where = f"transformer.{stack}.layers.{index}"
            for name, value in _layer_options(layer, stack, where).items():
                if found.setdefault(name, value) != value:
                    raise ValueError(f"{where} has {name} {value}, and the layers before it {found[name]}")
    if not found:
        raise ValueError("the transformer has no layers")
    for stack in LAYERS:
        norm = getattr(transformer, stack).norm
        found[f"num_{stack}_layers"] = len(getattr(transformer, stack).layers)
        if norm is None:
            if found["norm_first"]:
                raise ValueError(f"transformer.{stack}.norm is None: a pre-norm stack ends with a norm here")
            continue
        _require(norm, nn.LayerNorm, f"transformer.{stack}.norm")
        if norm.eps != found["layer_norm_eps"]:
            raise ValueError(f"transformer.{stack}.norm has eps {norm.eps}, and its layers {found['layer_norm_eps']}")
    return found


def _layer_options(layer: nn.Module, stack: str, where: str) -> dict[str, Any]:
    if type(layer) not in LAYERS[stack]:
        raise ValueError(f"{where} must be a torch.nn.{LAYERS[stack][0].__name__}, got {type(layer).__name__}")
    parts: Any = layer
    attentions = [getattr(parts, name) for name in _attentions(stack)]
    norms = [getattr(parts, f"norm{number}") for number in range(1, len(attentions) + 2)]
    rates = [getattr(parts, f"dropout{number}").p for number in range(1, len(attentions) + 2)]
    for linear in ("linear1", "linear2"):
        _require(getattr(parts, linear), nn.Linear, f"{where}.{linear}")
    for number, norm in enumerate(norms, 1):
        _require(norm, nn.LayerNorm, f"{where}.norm{number}")
    for name, attention in zip(_attentions(stack), attentions, strict=True):
        _require(attention, nn.MultiheadAttention, f"{where}.{name}")
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(f"{where} has an attention with kdim, vdim, add_bias_kv or add_zero_attn")
    for name, values in (
        ("norms' eps", [norm.eps for norm in norms]),
        ("dropout", rates),
        ("attentions' dropout", [attention.dropout for attention in attentions]),
        ("attentions' num_heads", [attention.num_heads for attention in attentions]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{where} has more than one value of its {name}: {', '.join(map(str, values))}")
    return {
        "d_model": attentions[0].embed_dim,
        "num_heads": attentions[0].num_heads,
        "d_feedforward": parts.linear1.out_features,
        "dropout": rates[0],
        "attention_dropout": attentions[0].dropout,
        "activation_dropout": parts.dropout.p,
        "activation": _activation(parts.activation, where),
        "norm_first": parts.norm_first,
        "layer_norm_eps": norms[0].eps,
    }


def _require(module: Any, kind: type, where: str) -> None:
    """Torch's class or ours of the same name, compiled or not; others may compute something else."""
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, kind) or type(module).__name__ != kind.__name__:
        raise ValueError(f"{where} must be a torch.nn.{kind.__name__}, got {type(module).__name__}")


def _activation(activation: Any, where: str) -> str:
    name = (
        ACTIVATION_MODULES.get(type(activation)) if isinstance(activation, nn.Module) else ACTIVATIONS.get(activation)
    )
    if name is None or getattr(activation, "approximate", "none") != "none":
        raise ValueError(f"{where} has activation {activation}; known are relu, silu, and gelu without approximation")
    return name


def _attentions(stack: str) -> tuple[str, ...]:
    return ("self_attn", "multihead_attn") if stack == "decoder" else ("self_attn",)


def _stack_weights(stack: Any, name: str) -> dict[str, Tensor]:
    """The weights of a stack under our names. Biases that it has not are zeros."""
    weights: dict[str, Tensor] = {}
    for index, layer in enumerate(stack.layers):
        found: dict[str, Tensor] = {}
        for attention in _attentions(name):
            module = getattr(layer, attention)
            found[f"{attention}.in_proj_weight"] = module.in_proj_weight
            found[f"{attention}.in_proj_bias"] = _or(module.in_proj_bias, 0.0, module.in_proj_weight[:, 0])
            found |= _linear(module.out_proj, f"{attention}.out_proj")
        for linear in ("linear1", "linear2"):
            found |= _linear(getattr(layer, linear), f"feed_forward.{linear}")
        for number in range(1, len(_attentions(name)) + 2):
            found |= _norm(getattr(layer, f"norm{number}"), f"norm{number}")
        weights |= {f"{name}.layers.{index}.{part}": x for part, x in found.items()}
    if stack.norm is not None:
        weights |= _norm(stack.norm, f"{name}.norm")
    return weights


def _linear(linear: nn.Linear, name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": linear.weight, f"{name}.bias": _or(linear.bias, 0.0, linear.weight[:, 0])}


def _norm(norm: nn.LayerNorm, name: str) -> dict[str, Tensor]:
    if norm.weight is None:
        raise ValueError(f"{name} has no weight (elementwise_affine=False)")
    return {f"{name}.weight": norm.weight, f"{name}.bias": _or(norm.bias, 0.0, norm.weight)}


def _or(x: Tensor | None, value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, value) if x is None else x
