"""What the tests of MultiheadAttention share: its options, masks, twins of ours and torch's, and inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_transformer import MultiheadAttention
from tests.inputs import normal

B, H, L, S, E = 3, 4, 7, 9, 24  # batch, heads, queries, keys, width

OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 10, "vdim": 17, "batch_first": True},
    "vdim_no_bias": {"vdim": 5, "bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn_kdim": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 6},
    "head_width_1": {"num_heads": E},
}


def bool_mask(*shape: int) -> Tensor:
    """Random; key 0 is kept, so that no row is masked whole (torch's result would be NaN)."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def padding(*lengths: int, size: int = S) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def twins(num_heads: int = H, embed_dim: int = E, **options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same random weights (biases too)."""
    ours, theirs = (kind(embed_dim, num_heads, **options) for kind in (MultiheadAttention, nn.MultiheadAttention))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(module: nn.MultiheadAttention, *, self_attention: bool = False) -> dict[str, Tensor]:
    if self_attention:
        return {"query": normal(B, L, E) if module.batch_first else normal(L, B, E)}
    widths = {"query": (L, E), "key": (S, module.kdim), "value": (S, module.vdim)}
    return {
        name: normal(B, length, width) if module.batch_first else normal(length, B, width)
        for name, (length, width) in widths.items()
    }
