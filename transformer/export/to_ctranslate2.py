"""Writes a Transformer as a model of CTranslate2."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fused_transformer.as_configured import norm_eps, what_changed
from fused_transformer.attention import MultiheadAttention
from fused_transformer.feed_forward import FeedForward
from fused_transformer.kernels import sinusoidal_positions
from fused_transformer.model import Transformer

if TYPE_CHECKING:
    from fused_transformer.tokenizer import Tokenizer

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")
# What numbers are kept as, and are multiplied as where they are loaded so; float32 in the others.
FLOATS = {"float16": torch.float16, "int8_float16": torch.float16}
FLOATS |= {"bfloat16": torch.bfloat16, "int8_bfloat16": torch.bfloat16}
ACTIVATIONS = {"relu": "RELU", "gelu": "GELU", "silu": "SWISH"}  # ours: theirs
TOKENIZER_FILE = "sentencepiece.model"


def ctranslate2(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    source_vocabulary: Sequence[str] | None = None,
    target_vocabulary: Sequence[str] | None = None,
    unknown_idx: int | None = None,
    quantization: str = "float32",
    longest: int = 1024,
) -> Path:
    """Write `model` to a folder that ctranslate2.Translator loads.

    Its log-probabilities are the model's but for rounding. The source is given without eos, which CTranslate2 appends,
    and decoding begins with bos.

    Args:
        model: a Transformer, of any dtype and on any device.
        path: the folder, made here; one that exists must be empty. It gets model.bin, config.json, the vocabularies,
            and the tokenizer as sentencepiece.model.
        tokenizer: the model's own; its pieces are both vocabularies.
        source_vocabulary, target_vocabulary: instead of a tokenizer, the tokens as text, each once, in the order of
            their numbers; target_vocabulary defaults to source_vocabulary. Without all of them a token is called by its
            number: "0", "1" ...
        unknown_idx: the token for what a vocabulary lacks, the same number in both. Default: the tokenizer's, or
            padding, which no sentence has.
        quantization: of the weights: "float32", "float16", "bfloat16", "int16", "int8", and int8 with the other weights
            in one of three float types, "int8_float32", "int8_float16" and "int8_bfloat16".
        longest: positions that the model can use, of source and target each: CTranslate2 keeps them as a table and
            refuses longer sentences. Its own limit of a source (max_input_length) is 1024 unless told otherwise.

    Returns:
        The folder.

    Raises:
        ImportError: ctranslate2 is not installed.
        FileExistsError: there is something at `path`.
        ValueError: CTranslate2 can't express this model or its configuration does not describe it, a weight is not
            finite or has no place in the quantization's float type, the vocabularies do not fit the model, or an option
            is out of its range.
        OSError: it could not be written; then there is nothing at `path`.

    What differs: padding that is generated counts as a token like others (here its embedding is 0).

    Source: CTranslate2 4, ctranslate2.specs.transformer_spec.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a fused_transformer.Transformer, got {type(model).__name__}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}")
    if longest < 1:
        raise ValueError(f"longest must be at least 1, got {longest}")
    reason = why_not(model) or _out_of_range(model, quantization)
    if reason is not None:
        raise ValueError(f"CTranslate2 can't express {reason}")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"there is something at {path} already")
    if tokenizer is not None:
        if source_vocabulary is not None or target_vocabulary is not None:
            raise ValueError("give a tokenizer or vocabularies, not both")
        source_vocabulary = pieces(tokenizer)
        unknown_idx = _unknown_of(tokenizer) if unknown_idx is None else unknown_idx
    vocabularies = _vocabularies(model, source_vocabulary, target_vocabulary)

    spec = _specification(model, longest)
    _name_tokens(spec, model, *vocabularies, model.config.padding_idx if unknown_idx is None else unknown_idx)
    spec.validate()
    spec.optimize(quantization)

    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        spec.save(str(unfinished))
        if tokenizer is not None:
            (unfinished / TOKENIZER_FILE).write_bytes(tokenizer.to_bytes())
        os.replace(unfinished, path)  # all of the folder or nothing
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def why_not(model: Transformer) -> str | None:
    """What about `model` CTranslate2 has no place for, or None."""
    changed = what_changed(model)
    if changed is not None:
        return changed
    for name in ("encoder", "decoder"):
        if len(getattr(model, name).layers) == 0:
            return f"a stack without layers (num_{name}_layers=0)"
    if model.config.activation not in ACTIVATIONS:
        return f"activation={model.config.activation!r}"
    source, target = model.source_embedding, model.target_embedding
    if target is not None and target.positions != source.positions:
        return f"embeddings that differ in positions ({source.positions!r} and {target.positions!r})"
    if (model.encoder.norm is None) != (model.decoder.norm is None):
        return "a final norm in one stack and none in the other"
    return None


def _out_of_range(model: Transformer, quantization: str) -> str | None:
    """The first weight that would be infinite in the file, or None."""
    dtype = FLOATS.get(quantization, torch.float32)
    for name, x in model.named_parameters():
        if not x.isfinite().all():
            return f"{name}, of which not all is finite"
        if not x.float().to(dtype).isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            largest = f"{x.abs().max().item():.4g} is beyond {kind}'s largest number, {torch.finfo(dtype).max:.6g}"
            return f"{name} with quantization {quantization!r}: {largest}"
    return None


# ---------------------------------------------------------------------------------------------- vocabularies


def pieces(tokenizer: Tokenizer) -> list[str]:
    """The text of each token of a tokenizer, as CTranslate2 wants sentences cut."""
    processor = _processor(tokenizer)
    return [processor.id_to_piece(number) for number in range(len(tokenizer))]


def _unknown_of(tokenizer: Tokenizer) -> int:
    return _processor(tokenizer).unk_id()


def _processor(tokenizer: Tokenizer) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())


def _vocabularies(
    model: Transformer, source: Sequence[str] | None, target: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Both vocabularies, checked: a token for each row of the tables, and no text twice."""
    if source is None and target is not None:
        raise ValueError("target_vocabulary needs source_vocabulary")
    sizes = {"source": model.config.source_vocab_size, "target": model.config.target_vocab_size}
    given = {"source": source, "target": source if target is None else target}
    checked = []
    for name, size in sizes.items():
        tokens = given[name]
        texts = [str(number) for number in range(size)] if tokens is None else list(tokens)
        if len(texts) != size:
            raise ValueError(f"the {name} vocabulary has {len(texts)} tokens, the model {size}")
        if len(set(texts)) < size:
            twice = next(text for text in texts if texts.count(text) > 1)
            raise ValueError(f"the {name} vocabulary has {twice!r} more than once")
        checked.append(texts)
    return checked[0], checked[1]


def _name_tokens(spec: Any, model: Transformer, source: list[str], target: list[str], unknown_idx: int) -> None:
    """The vocabularies, and which of their tokens are special."""
    config, names = model.config, spec.config
    if not 0 <= unknown_idx < min(len(source), len(target)):
        raise ValueError(f"unknown_idx must be a token of both vocabularies, got {unknown_idx}")
    if config.eos_idx >= len(source):
        raise ValueError(f"eos_idx {config.eos_idx} must be a token of the source too: CTranslate2 appends it there")
    for what, index in (("eos", config.eos_idx), ("unknown", unknown_idx)):
        if source[index] != target[index]:
            raise ValueError(
                f"CTranslate2 has one name for {what}, got {source[index]!r} in the source vocabulary and "
                f"{target[index]!r} in the target's"
            )
    spec.register_source_vocabulary(source)
    spec.register_target_vocabulary(target)
    names.unk_token, names.bos_token, names.eos_token = (
        target[unknown_idx],
        target[config.bos_idx],
        target[config.eos_idx],
    )
    names.decoder_start_token = names.bos_token
    names.add_source_bos, names.add_source_eos = False, True


# ---------------------------------------------------------------------------------------------- weights


def _specification(model: Transformer, longest: int) -> Any:
    """CTranslate2's description of the model, with its weights."""
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'fused-transformer[ctranslate2]'") from error

    config = model.config
    spec = transformer_spec.TransformerSpec.from_config(
        (len(model.encoder.layers), len(model.decoder.layers)),
        config.num_heads,
        pre_norm=model.encoder.norm is not None,  # what makes room for a final norm; the order itself is set below
        activation=common_spec.Activation[ACTIVATIONS[config.activation]],
    )
    encoder, decoder = spec.encoder, spec.decoder
    encoder.pre_norm = decoder.pre_norm = config.norm_first
    spec.config.layer_norm_epsilon = norm_eps(model)

    source = model.source_embedding.weight
    target = source if model.target_embedding is None else model.target_embedding.weight
    encoder.embeddings[0].weight, decoder.embeddings.weight = _values(source), _values(target)
    encoder.scale_embeddings = decoder.scale_embeddings = True  # √E
    # Always explicit, where there are no positions too: without a table CTranslate2 makes one of its own.
    positions = torch.zeros(longest, config.d_model)
    layout = model.source_embedding.positions
    if layout is not None:
        positions = sinusoidal_positions(longest, config.d_model, layout=layout)
    encoder.position_encodings.encodings = decoder.position_encodings.encodings = positions

    encoder_layers: Any = model.encoder.layers
    decoder_layers: Any = model.decoder.layers
    for layer, ours in zip(encoder.layer, encoder_layers, strict=True):
        _self_attention(layer.self_attention, ours.self_attn, ours.norm1)
        _feed_forward(layer.ffn, ours.feed_forward, ours.norm2)
    for layer, ours in zip(decoder.layer, decoder_layers, strict=True):
        _self_attention(layer.self_attention, ours.self_attn, ours.norm1)
        _cross_attention(layer.attention, ours.multihead_attn, ours.norm2)
        _feed_forward(layer.ffn, ours.feed_forward, ours.norm3)
    for stack, norm in ((encoder, model.encoder.norm), (decoder, model.decoder.norm)):
        if norm is not None:
            _norm(stack.layer_norm, norm)
    projection = model.output_projection
    _linear(decoder.projection, target if projection is None else projection.weight, getattr(projection, "bias", None))
    return spec


def _values(x: Tensor) -> Tensor:
    # A copy in any case: CTranslate2 quantises in place, where the model's weights would be.
    return x.detach().to("cpu", torch.float32, copy=True)


def _linear(spec: Any, weight: Tensor, bias: Tensor | None) -> None:
    spec.weight = _values(weight)
    if bias is not None:
        spec.bias = _values(bias)


def _norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma = _values(torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight)
    spec.beta = _values(torch.zeros(norm.normalized_shape) if norm.bias is None else norm.bias)


def _self_attention(spec: Any, attention: MultiheadAttention, norm: nn.LayerNorm) -> None:
    _linear(spec.linear[0], attention.in_proj_weight, attention.in_proj_bias)
    _linear(spec.linear[1], attention.out_proj.weight, attention.out_proj.bias)
    _norm(spec.layer_norm, norm)


def _cross_attention(spec: Any, attention: MultiheadAttention, norm: nn.LayerNorm) -> None:
    """The query by itself, keys and values as one matrix."""
    width = attention.embed_dim
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    _linear(spec.linear[0], weight[:width], None if bias is None else bias[:width])
    _linear(spec.linear[1], weight[width:], None if bias is None else bias[width:])
    _linear(spec.linear[2], attention.out_proj.weight, attention.out_proj.bias)
    _norm(spec.layer_norm, norm)


def _feed_forward(spec: Any, feed_forward: FeedForward, norm: nn.LayerNorm) -> None:
    _linear(spec.linear_0, feed_forward.linear1.weight, feed_forward.linear1.bias)
    _linear(spec.linear_1, feed_forward.linear2.weight, feed_forward.linear2.bias)
    _norm(spec.layer_norm, norm)
