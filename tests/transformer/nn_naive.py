"""Encoder and decoder layers from their formulas, in the dtype of their weights: the judge where torch is wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def attention(
    module: nn.MultiheadAttention, query: Tensor, memory: Tensor, allowed: Tensor, bias: Tensor | float = 0.0
):
    """(N, L, E) and each head's weights; allowed broadcasts to (N, H, L, S). Nothing allowed: weights of 0."""
    matrices, offsets = module.in_proj_weight.chunk(3), (0.0, 0.0, 0.0)
    if module.in_proj_bias is not None:
        offsets = module.in_proj_bias.chunk(3)
    q, k, v = (
        (x @ w.T + b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, memory, memory), matrices, offsets, strict=True)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(module.head_dim) + bias
    allowed = allowed & (scores > -torch.inf)
    numerators = torch.where(allowed, torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)), 0.0)
    weights = numerators / numerators.sum(-1, keepdim=True).clamp(min=1e-300)
    heads = (weights @ v).transpose(1, 2).flatten(2)
    out = heads @ module.out_proj.weight.T
    return (out if module.out_proj.bias is None else out + module.out_proj.bias), weights


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    return y * norm.weight + (0.0 if norm.bias is None else norm.bias)


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    hidden = x @ layer.linear1.weight.T + (0.0 if layer.linear1.bias is None else layer.linear1.bias)
    y = layer.activation(hidden) @ layer.linear2.weight.T
    return y if layer.linear2.bias is None else y + layer.linear2.bias


def layer(module: nn.Module, x: Tensor, *attentions) -> Tensor:
    """A layer whose sublayers are `attentions`, each a function of x, and the feed-forward network; all batch first."""
    norms = [module.norm1, module.norm2] + ([module.norm3] if hasattr(module, "norm3") else [])
    for sublayer, norm in zip((*attentions, lambda y: feed_forward(module, y)), norms, strict=True):
        x = x + sublayer(layer_norm(norm, x)) if module.norm_first else layer_norm(norm, x + sublayer(x))
    return x
