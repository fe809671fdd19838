"""Hugging Face's Marian models (OPUS-MT and others) as a Transformer of this package.

from transformers import MarianMTModel
from fused_transformer.integrations import marian

theirs = MarianMTModel.from_pretrained(...)
model = marian.from_marian(theirs.config, theirs.state_dict())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_transformer.config import TransformerConfig
from fused_transformer.extra_parts import with_weights
from fused_transformer.kernels import sinusoidal_positions
from fused_transformer.model import Transformer

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}  # theirs: ours
STACKS = ("encoder", "decoder")
TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
# The logit of what is never generated. So far below any other that its probability is 0 in float32; finite, so that a
# loss with label smoothing is.
NEVER = -1e4
# Their table of positions may have been saved in 16 bits; other layouts are off by 1 and more.
POSITION_TOLERANCE = 1e-2


def from_marian(config: Any, state_dict: Mapping[str, Tensor]) -> Transformer:
    """The same model in ours: logits and greedy translations are theirs, but for rounding.

    Args:
        config: a MarianConfig, or its values as a dict (config.json).
        state_dict: of a MarianMTModel, in float32, float16 or bfloat16; tied weights need to be there once.

    Returns:
        A Transformer in evaluation mode, float32, on the CPU. Tokens keep their numbers. Where decoding starts with
        padding, as usual, the target gets one more token, bos, with the embedding of padding: here padding has none.

    What differs: bos and padding are never generated (generation configurations of Marian models forbid padding as
        well, by bad_words_ids). Sentences may be longer than max_position_embeddings. Embeddings and projection are
        three tables even where they were one, as the projection has a bias.

    Raises:
        ValueError: a field of the configuration that this package's model can't follow, by its name; or weights that
            are missing, left over, or of another shape.

    Source: Junczys-Dowmunt et al. 2018, arXiv:1804.00344; transformers, models/marian/modeling_marian.py.
    """
    fields = dict(config) if isinstance(config, Mapping) else config.to_dict()
    _check(fields)
    weights = {name: x.detach().to("cpu", torch.float32) for name, x in state_dict.items()}
    _check_positions(weights, fields["d_model"])
    source, target, projection = _tables(weights, fields)
    padding, eos, first = (_token(fields, name, source, target) for name in TOKENS)
    bias = weights.pop("final_logits_bias", torch.zeros(1, len(target))).flatten().clone()
    if len(bias) != len(target):
        raise ValueError(f"final_logits_bias must have {len(target)} numbers, one a token, got {len(bias)}")
    if first == padding:  # whose embedding is 0 here, positions included
        first = len(target)
        target = torch.cat([target, target[padding, None]])
        projection = torch.cat([projection, torch.zeros_like(projection[:1])])
        bias = torch.cat([bias, bias.new_zeros(1)])
    bias[padding] = bias[first] = NEVER
    if not fields.get("scale_embedding", False):
        root = fields["d_model"] ** 0.5  # which our embedding multiplies by
        source, target = source / root, target / root

    ours = {
        "source_embedding.weight": source.clone(),
        "target_embedding.weight": target.clone(),
        "output_projection.weight": projection.clone(),
        "output_projection.bias": bias,
    }
    for stack in STACKS:
        for index in range(fields[f"{stack}_layers"]):
            ours |= _layer(weights, stack, index)
    if weights:
        raise ValueError(f"the state_dict has weights that Marian's model has not: {', '.join(sorted(weights))}")
    settings = TransformerConfig(
        source_vocab_size=len(source),
        target_vocab_size=len(target),
        d_model=fields["d_model"],
        num_heads=fields["encoder_attention_heads"],
        d_feedforward=fields["encoder_ffn_dim"],
        num_encoder_layers=fields["encoder_layers"],
        num_decoder_layers=fields["decoder_layers"],
        dropout=float(fields.get("dropout", 0.0)),
        attention_dropout=float(fields.get("attention_dropout", 0.0)),
        activation_dropout=float(fields.get("activation_dropout", 0.0)),
        activation=ACTIVATIONS[fields["activation_function"]],
        positions="concat_paper",
        tie_embeddings="separate",
        padding_idx=padding,
        bos_idx=first,
        eos_idx=eos,
    )
    try:
        return with_weights(settings, ours).eval()
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of this configuration: {error}") from None


def _check(fields: dict[str, Any]) -> None:
    """That our model can follow the configuration."""
    sizes = ["d_model", "vocab_size"]
    sizes += [f"{stack}_{what}" for stack in STACKS for what in ("layers", "ffn_dim", "attention_heads")]
    missing = [name for name in (*sizes, *TOKENS, "activation_function") if fields.get(name) is None]
    if missing:
        raise ValueError(f"the configuration has no {', '.join(missing)}")
    for name in sizes:
        if not isinstance(fields[name], int) or isinstance(fields[name], bool):
            raise ValueError(f"{name} must be an int, got {fields[name]!r}")
    if fields.get("model_type", "marian") != "marian":
        raise ValueError(f"model_type must be 'marian', got {fields['model_type']!r}")
    if fields["activation_function"] not in ACTIVATIONS:
        raise ValueError(
            f"activation_function must be one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"got {fields['activation_function']!r}"
        )
    for what in ("ffn_dim", "attention_heads"):
        encoder, decoder = fields[f"encoder_{what}"], fields[f"decoder_{what}"]
        if encoder != decoder:
            raise ValueError(f"encoder_{what} and decoder_{what} must be equal, got {encoder} and {decoder}")


def _token(fields: dict[str, Any], name: str, source: Tensor, target: Tensor) -> int:
    """A special token's number, checked: a row of the target's table, and padding of the source's too."""
    token = fields[name]
    if name == "eos_token_id" and isinstance(token, (list, tuple)):
        if len(token) != 1:
            raise ValueError(f"{name} must be one token, got {list(token)}")
        token = token[0]
    size = min(len(source), len(target)) if name == "pad_token_id" else len(target)
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
        raise ValueError(f"{name} must be a token of the vocabulary, 0 ... {size - 1}, got {token!r}")
    return token


def _check_positions(weights: dict[str, Tensor], d_model: int) -> None:
    """Take their tables of positions out; they are to be the ones that we compute."""
    for stack in STACKS:
        theirs = weights.pop(f"model.{stack}.embed_positions.weight", None)
        if theirs is None:
            continue
        ours = sinusoidal_positions(len(theirs), d_model, layout="concat_paper")
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=POSITION_TOLERANCE):
            raise ValueError(
                f"model.{stack}.embed_positions.weight is not Marian's sinusoidal table, concat_paper here"
            )


def _tables(weights: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of source and target, and the output projection, of which tied ones may be there once.

    Their forward reads encoder.embed_tokens, decoder.embed_tokens and lm_head, and never `shared`. These are the same
    Parameter only where tie_word_embeddings says so, and not even then if a checkpoint has them with different numbers
    (PreTrainedModel.tie_weights): so `shared` and the others count for what is not there itself.
    """
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    shared = weights.pop("model.shared.weight", None)
    source, target, projection = (weights.pop(name, None) for name in names)
    tied, one = fields.get("tie_word_embeddings", True), fields.get("share_encoder_decoder_embeddings", True)
    if one:
        source, target, projection = (
            _first(source, shared, target),
            _first(target, shared, source),
            _first(projection, shared) if tied else projection,
        )
    if tied:
        target, projection = _first(target, projection), _first(projection, target)
    size = fields["vocab_size"]
    target_size = size if one else fields.get("decoder_vocab_size") or size
    found = []
    tables = ((source, size), (target, target_size), (projection, target_size))
    for name, (table, size) in zip(names, tables, strict=True):
        if table is None:
            raise ValueError(f"the state_dict has no {name}")
        if table.shape != (size, fields["d_model"]):
            raise ValueError(f"{name} must be ({size}, {fields['d_model']}), got {tuple(table.shape)}")
        found.append(table)
    return found[0], found[1], found[2]


def _first(*tables: Tensor | None) -> Tensor | None:
    return next((table for table in tables if table is not None), None)


def _layer(weights: dict[str, Tensor], stack: str, index: int) -> dict[str, Tensor]:
    """The weights of one layer under our names."""
    attentions = {"self_attn": "self_attn"} | ({"multihead_attn": "encoder_attn"} if stack == "decoder" else {})
    norms = [*(f"{theirs}_layer_norm" for theirs in attentions.values()), "final_layer_norm"]
    copied = {f"norm{number}": theirs for number, theirs in enumerate(norms, 1)}
    copied |= {f"{ours}.out_proj": f"{theirs}.out_proj" for ours, theirs in attentions.items()}
    copied |= {"feed_forward.linear1": "fc1", "feed_forward.linear2": "fc2"}

    def take(name: str) -> Tensor:
        full = f"model.{stack}.layers.{index}.{name}"
        if full not in weights:
            raise ValueError(f"the state_dict has no {full}")
        return weights.pop(full)

    found = {}
    for part in ("weight", "bias"):
        for ours, theirs in copied.items():
            found[f"{ours}.{part}"] = take(f"{theirs}.{part}").clone()
        for ours, theirs in attentions.items():
            rows = [take(f"{theirs}.{name}_proj.{part}") for name in "qkv"]
            found[f"{ours}.in_proj_{part}"] = torch.cat(rows)
    return {f"{stack}.layers.{index}.{name}": x for name, x in found.items()}
