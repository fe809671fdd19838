"""What a module's call costs beside its products: MultiheadAttention of one token against torch.nn's, CALLS in a row.

One sequence of one token attends to itself, as in the first step of decoding. The two products are the same on both
sides, and what else there is to compute is next to nothing: the rows differ by the host's time, spent in Python and in
torch's dispatcher. In inference (eval mode without autograd) torch.nn has a path of its own in C++.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import MultiheadAttention
from tests.oracle import assert_matches

WIDTH, HEADS = 512, 8  # transformer-base
CALLS = 20  # of one module, before the other's weights push its own out of the cache


@pytest.mark.parametrize("need_weights", [False, True], ids=["without weights", "with weights"])
@pytest.mark.parametrize("mode", ["inference", "forward+backward"])
def bench_multihead_attention_call(compare, mode, need_weights, device):
    training = mode != "inference"
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training).to(device)
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training).to(device)
    ours.load_state_dict(theirs.state_dict())
    x, upstream = (torch.randn(1, 1, WIDTH, device=device) for _ in range(2))
    x.requires_grad_(training)

    def once(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        out, weights = module(x, x, x, need_weights=need_weights)
        results = {"out": out} | ({"weights": weights} if need_weights else {})
        if training:
            wanted = {"x": x, **dict(module.named_parameters())}
            gradients = torch.autograd.grad(out, list(wanted.values()), upstream)
            results |= {"d" + name: gradient for name, gradient in zip(wanted, gradients, strict=True)}
        return results

    def in_a_row(module: nn.Module) -> dict[str, Tensor]:
        with torch.set_grad_enabled(training):
            for _ in range(CALLS):
                results = once(module, x, upstream)
        return results

    def check(results) -> None:
        double = (y.detach().double().requires_grad_(y.requires_grad) for y in (x, upstream))
        exact = {name: y.detach() for name, y in once(copy.deepcopy(theirs).double(), *double).items()}
        assert_matches(results["fused"], exact, results["torch.nn"], factor=4.0, ulps=16.0)

    compare({"torch.nn": lambda: in_a_row(theirs), "fused": lambda: in_a_row(ours)}, check=check)
