"""No op has a forward-mode derivative: a tangent is refused, and never dropped."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from fused_transformer.kernels import (
    attention,
    bias_act,
    cross_entropy,
    decode_attention,
    embedding,
    layer_norm,
    log_softmax_top_k,
)
from fused_transformer.kernels.linear import PackedLinear, linear
from tests.inputs import normal

TOKENS = torch.tensor([[1, 0, 2]])
CALLS = {
    "attention": lambda x: attention(x[None, None], x[None, None], x[None, None]),
    "bias_act": lambda x: bias_act(x, torch.zeros(8), activation="relu"),
    "cross_entropy": lambda x: cross_entropy(x, torch.tensor([1, 2, 3])),
    "decode_attention": lambda x: decode_attention(x[:1, None, None], x[None, None], x[None, None]),
    "embedding": lambda x: embedding(TOKENS, x),
    "layer_norm": layer_norm,
    "linear": lambda x: linear(x, PackedLinear(torch.ones(2, 8))),
    "log_softmax_top_k": lambda x: log_softmax_top_k(x, 2),
    "log_softmax_top_k's addend": lambda x: log_softmax_top_k(torch.zeros(3, 8), 2, addend=x[:, 0]),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name):
    x = normal(3, 8)
    with forward_ad.dual_level():
        CALLS[name](x)  # without one
        with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=r"jvp|forward.mode"):
            CALLS[name](forward_ad.make_dual(x, torch.ones_like(x)))
