"""A small call of every public op with each kind of argument, for the tests of torch.compile and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_transformer import kernels
from fused_transformer.kernels import OPS
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.attention import self_attention as attention_to_itself
from tests.inputs import normal


class Call(NamedTuple):
    """function(**tensors, **options): the float tensors have gradients, if the op has any."""

    function: Callable
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @property
    def op(self) -> Op:
        return OPS[self.function.__module__.rpartition(".")[2]]

    def run(self, **tensors: Tensor):
        return self.function(**{**self.tensors, **tensors}, **self.options)


def seed(device: str = "cpu") -> Tensor:
    return torch.tensor([20170612], device=device)


def integers(*numbers, device: str = "cpu", dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def attention(device: str) -> Call:
    tensors = {
        "q": normal(2, 5, 4, 8, device=device).transpose(1, 2),
        "k": normal(2, 2, 7, 8, device=device),
        "v": normal(2, 2, 7, 8, device=device),
        "bias": normal(4, 5, 7, device=device),
    }
    options = {"k_lengths": integers(3, 7, device=device), "causal": "bottom_right", "window": (4, -1)}
    return Call(kernels.attention_with_lse, tensors, options | {"dropout_p": 0.25, "seed": seed(device)})


def attention_keep(device: str) -> Call:
    tensors = {name: normal(2, 3, 6, 16, device=device) for name in "qkv"}
    keep = torch.rand(2, 1, 1, 6).to(device) < 0.6
    return Call(kernels.attention, tensors, {"keep": keep, "scale": 0.5})


def attention_packed(device: str) -> Call:
    tensors = {"q": normal(5, 4, 8, device=device), "k": normal(9, 2, 8, device=device)}
    tensors["v"] = normal(9, 2, 8, device=device)
    offsets = {"q_offsets": integers(0, 2, 5, device=device), "k_offsets": integers(0, 3, 7, device=device)}
    return Call(kernels.attention, tensors, offsets)


def self_attention(device: str) -> Call:
    tensors = {"qkv": normal(2, 6, 3 * 2 * 16, device=device)}
    options = {"heads": 2, "causal": True, "weights": "mean", "dropout_p": 0.25, "seed": seed(device)}
    return Call(attention_to_itself, tensors, options)


def attention_weights(device: str) -> Call:
    tensors = {name: normal(2, 2, 5, 8, device=device) for name in "qk"}
    lse = torch.logsumexp(tensors["q"] @ tensors["k"].mT / 8**0.5, -1)
    return Call(kernels.attention_weights, tensors, {"lse": lse, "dropout_p": 0.5, "seed": seed(device)})


def decode_attention(device: str) -> Call:
    tensors = {"q": normal(3, 4, 1, 8, device=device), "k_cache": normal(5, 2, 6, 8, device=device)}
    tensors["v_cache"] = normal(5, 2, 6, 8, device=device)
    rows = integers(0, 4, 2, device=device, dtype=torch.int32)
    return Call(kernels.decode_attention_with_lse, tensors, {"lengths": integers(1, 6, 3, device=device), "rows": rows})


def layer_norm(device: str) -> Call:
    tensors = {"x": normal(3, 5, 24, device=device), "weight": normal(24, device=device)}
    return Call(kernels.layer_norm, tensors | {"bias": normal(24, device=device)}, {"eps": 1e-3})


def rms_norm(device: str) -> Call:
    return Call(kernels.rms_norm, {"x": normal(7, 24, device=device), "weight": normal(24, device=device)}, {})


def add_layer_norm(device: str) -> Call:
    tensors = {name: normal(3, 5, 24, device=device) for name in ("x", "residual")}
    tensors |= {name: normal(24, device=device) for name in ("weight", "bias", "x_bias")}
    return Call(kernels.add_layer_norm, tensors, {"dropout_p": 0.25, "seed": seed(device)})


def add_rms_norm_with_total(device: str) -> Call:
    tensors = {name: normal(3, 5, 24, device=device) for name in ("x", "residual")}
    return Call(kernels.add_rms_norm_with_total, tensors, {})


def embedding(device: str) -> Call:
    tensors = {"table": normal(11, 6, device=device), "tokens": torch.randint(11, (3, 4)).to(device)}
    options = {"start": integers(1, 0, 5, device=device), "padding_idx": 2, "dropout_p": 0.25, "seed": seed(device)}
    return Call(kernels.embedding, tensors, options)


def embedding_ids(device: str) -> Call:
    tensors = {"table": normal(11, 6, device=device), "tokens": torch.randint(11, (4, 3)).to(device).T}
    return Call(kernels.embedding, tensors, {"position_ids": integers(3, 1, 4, 1, device=device)})


def bias_act(device: str) -> Call:
    tensors = {"x": normal(3, 5, 24, device=device), "bias": normal(24, device=device)}
    return Call(kernels.bias_act, tensors, {"activation": "gelu", "dropout_p": 0.25, "seed": seed(device)})


def cross_entropy(device: str) -> Call:
    tensors = {"logits": normal(4, 5, 33, device=device), "targets": torch.randint(33, (4, 5)).to(device)}
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 2, "reduction": "none"}
    return Call(kernels.cross_entropy, tensors, options)


def linear_cross_entropy(device: str) -> Call:
    tensors = {"hidden": normal(4, 5, 8, device=device), "weight": normal(33, 8, device=device)}
    tensors |= {"bias": normal(33, device=device), "targets": torch.randint(33, (4, 5)).to(device)}
    return Call(kernels.linear_cross_entropy, tensors, {"label_smoothing": 0.1, "reduction": "none"})


def log_softmax_top_k(device: str) -> Call:
    tensors = {"logits": normal(6, 33, device=device), "addend": normal(6, device=device)}
    return Call(kernels.log_softmax_top_k, tensors, {"k": 5, "beams": 3})


CALLS = {
    make.__name__: make
    for make in (
        attention,
        attention_keep,
        attention_packed,
        attention_weights,
        self_attention,
        decode_attention,
        layer_norm,
        rms_norm,
        add_layer_norm,
        add_rms_norm_with_total,
        embedding,
        embedding_ids,
        bias_act,
        cross_entropy,
        linear_cross_entropy,
        log_softmax_top_k,
    )
}
DIFFERENTIABLE = [name for name in CALLS if name not in ("decode_attention", "log_softmax_top_k")]
