"""Models with a part that was changed after they were built, and how the part is named."""

from __future__ import annotations

import torch
import torch.nn.utils.prune
from torch import nn

from fused_transformer import Transformer
from fused_transformer.attention import MultiheadAttention
from fused_transformer.feed_forward import FeedForward
from fused_transformer.layers import DecoderLayer, EncoderLayer


class OtherLayer(EncoderLayer):
    pass


class OtherNorm(nn.RMSNorm):
    pass


class OtherProjection(Transformer):
    def project(self, hidden):
        return -super().project(hidden)


def replaced(path: str, value):
    """A function that sets an attribute or a module of a model."""

    def change(model: Transformer) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value() if callable(value) else value)

    return change


def _other_class(model: Transformer) -> None:
    model.encoder.layers[0].__class__ = OtherLayer


def _other_forward(model: Transformer) -> None:
    inner = model.decoder.layers[1].feed_forward
    inner.forward = lambda x: 2 * x


def _added_keys(model: Transformer) -> None:
    model.decoder.layers[0].multihead_attn = MultiheadAttention(24, 3, add_bias_kv=True, batch_first=True)


CHANGES = {  # name: options of `tiny`, the change, what it is called
    "num_heads": (
        {},
        replaced("decoder.layers.0.self_attn.num_heads", 2),
        r"decoder\.layers\.0\.self_attn with num_heads 2, where the configuration has 3",
    ),
    "head_dim": ({}, replaced("decoder.layers.1.multihead_attn.head_dim", 4), ".*multihead_attn with head_dim 4, .* 8"),
    "activation": (
        {},
        replaced("encoder.layers.1.feed_forward.activation", "gelu"),
        r"encoder\.layers\.1\.feed_forward with activation 'gelu', where the configuration has 'relu'",
    ),
    "norm_first": ({}, replaced("decoder.layers.1.norm_first", True), r"decoder\.layers\.1 with norm_first True"),
    "layer_class": ({}, _other_class, r"encoder\.layers\.0 of class \S+\.OtherLayer, and not \S+\.EncoderLayer"),
    "layer_of_torch": (
        {},
        lambda model: model.decoder.layers.insert(0, nn.TransformerDecoderLayer(24, 3, 40, batch_first=True)),
        r"decoder\.layers\.0 of class torch\.nn\.\S+\.TransformerDecoderLayer, and not \S+\.DecoderLayer",
    ),
    "attention_class": (
        {},
        lambda model: setattr(model.encoder.layers[0], "self_attn", nn.MultiheadAttention(24, 3, batch_first=True)),
        r"encoder\.layers\.0\.self_attn of class torch\.nn\.modules\.activation\.MultiheadAttention, and not "
        r"fused_transformer\.attention\.MultiheadAttention",
    ),
    "added_keys": ({}, _added_keys, ".*multihead_attn with kdim, vdim, add_bias_kv or add_zero_attn"),
    "feed_forward_class": (
        {},
        replaced("encoder.layers.0.feed_forward", nn.Identity),
        r".*feed_forward of class \S+\.Identity",
    ),
    "linear_class": (
        {},
        replaced("decoder.layers.0.feed_forward.linear2", nn.Identity),
        r".*linear2 of class \S+\.Identity",
    ),
    "forward": ({}, _other_forward, r"decoder\.layers\.1\.feed_forward whose forward was replaced"),
    "norm_class": (
        {},
        lambda model: setattr(model.encoder.layers[0], "norm2", OtherNorm(24)),
        r"encoder\.layers\.0\.norm2 of class \S+\.OtherNorm, and not \S+\.AddLayerNorm",
    ),
    "no_final_norm": ({"norm_first": True}, replaced("decoder.norm", None), r"decoder\.norm None"),
    "projection_class": (
        {"tie_embeddings": "separate"},
        replaced("output_projection", nn.Identity),
        r"output_projection of class \S+\.Identity, and not \S+\.Linear",
    ),
    "embedding_class": (
        {},
        replaced("source_embedding", lambda: nn.Embedding(31, 24)),
        r"source_embedding of class \S+\.Embedding",
    ),
    "method": ({}, lambda model: setattr(model, "project", model.project), r"another project\(\)"),
    "method_of_class": ({}, lambda model: setattr(model, "__class__", OtherProjection), r"another project\(\)"),
    "eps": ({}, replaced("decoder.layers.0.norm1.eps", 0.1), r"norms that differ in eps \(1e-05, 0.1\)"),
}


def _cut(model: Transformer) -> None:
    model.encoder.layers, model.decoder.layers = model.encoder.layers[:1], model.decoder.layers[1:]


def _narrowed(model: Transformer) -> None:
    model.encoder.layers[1].feed_forward = FeedForward(24, 16)


def _without_biases(model: Transformer) -> None:
    model.decoder.layers[0] = DecoderLayer(24, 3, 40, dropout=0.0, bias=False)


def _another_eps(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.3


def _parametrized(model: Transformer) -> None:
    for module in (model.encoder.layers[0].feed_forward.linear1, model.decoder.layers[0].multihead_attn.out_proj):
        nn.utils.parametrizations.weight_norm(module)
        nn.init.uniform_(module.parametrizations.weight.original0, 0.5, 1.0)


def _norm_without_weight(model: Transformer) -> None:
    model.decoder.layers[1].norm2.weight = None


def _compiled(model: Transformer) -> None:
    model.encoder = torch.compile(model.encoder, backend="eager")
    model.decoder.layers[0] = torch.compile(model.decoder.layers[0], backend="eager")


def _with_more(model: Transformer) -> None:
    model.more = nn.LayerNorm(3, eps=0.1)


def _watched(model: Transformer) -> None:
    model.encoder.layers[0].register_forward_hook(lambda module, inputs, output: None)
    nn.utils.prune.random_unstructured(model.decoder.layers[0].feed_forward.linear1, "weight", 0.5)
    model.decoder.layers[0].dropout = 0.5


# What the weights themselves tell, and so is followed.
FOLLOWED = {
    "depth": _cut,
    "compiled": _compiled,
    "with_more": _with_more,
    "feed_forward_width": _narrowed,
    "without_biases": _without_biases,
    "eps": _another_eps,
    "parametrized": _parametrized,
    "norm_without_weight": _norm_without_weight,
    "watched_and_pruned": _watched,
}


def changed(model: Transformer, change) -> Transformer:
    with torch.no_grad():
        change(model)
    return model.eval()
