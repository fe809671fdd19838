"""Whoever gets a result may write into it, as into torch's own, whichever backend made it.

What the backward pass needs is an exception, and there it is the backward pass that says so, as torch's does.
"""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import add_layer_norm, attention, bias_act, cross_entropy, embedding, layer_norm
from tests.inputs import running_on
from tests.oracle import assert_equal

TOKENS = torch.tensor([[0, 5, 2], [8, 1, 1]])
RESULTS = {
    "attention": ((2, 2, 3, 8), lambda x: attention(x, x, x)),
    "bias_act": ((2, 3, 8), lambda x: bias_act(x, None, activation="relu")),
    "layer_norm": ((2, 3, 8), lambda x: layer_norm(x)),
    "add_layer_norm": ((2, 3, 8), lambda x: add_layer_norm(x, x * 2)),
    "cross_entropy": ((2, 3, 9), lambda x: cross_entropy(x, TOKENS.to(x.device), reduction="none")),
    "embedding": ((9, 8), lambda x: embedding(TOKENS.to(x.device), x)),
}
NEEDED = ("attention", "bias_act")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "reference"])
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_with_a_gradient_can_be_written_into(name, backend, dtype, device):
    shape, function = RESULTS[name]
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    with running_on(backend):
        (expected,) = torch.autograd.grad((function(x) * 3).sum(), x)
        y = function(x)
        y *= 3
        if name in NEEDED:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
            return
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_equal(gradient, expected)
