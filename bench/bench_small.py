"""Small calls: a token, or a sentence, at Transformer-base's width, with nothing to differentiate, and with gradients.

There the kernel is the least of it: what is timed is what a call costs around it, in microseconds of checks, choices
and allocations. A row is 100 calls, one after the other, so that the clock is not what is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.agreement import forward_backward
from fused_transformer import kernels

CALLS = 100
WIDTH, HEADS, VOCABULARY = 512, 8, 1000

OPS: dict[str, tuple[Callable, Callable, Callable]] = {  # torch's functions, ours, and their arguments
    "attention": (
        F.scaled_dot_product_attention,
        kernels.attention,
        lambda tokens: [torch.randn(1, HEADS, tokens, WIDTH // HEADS) for _ in range(3)],
    ),
    "layer_norm": (
        lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias),
        kernels.layer_norm,
        lambda tokens: [torch.randn(1, tokens, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)],
    ),
    "add_layer_norm": (
        lambda x, residual, weight, bias: F.layer_norm(x + residual, (WIDTH,), weight, bias),
        kernels.add_layer_norm,
        lambda tokens: [*torch.randn(2, 1, tokens, WIDTH), *torch.randn(2, WIDTH)],
    ),
    "embedding": (
        F.embedding,
        lambda tokens, table: kernels.embedding(tokens, table, positions=None, scale=1.0),
        lambda tokens: [torch.randint(VOCABULARY, (1, tokens)), torch.randn(VOCABULARY, WIDTH)],
    ),
    "bias_act": (
        lambda x, bias: F.gelu(x + bias),
        lambda x, bias: kernels.bias_act(x, bias, activation="gelu"),
        lambda tokens: [torch.randn(1, tokens, 4 * WIDTH), torch.randn(4 * WIDTH)],
    ),
    "cross_entropy": (
        F.cross_entropy,
        kernels.cross_entropy,
        lambda tokens: [torch.randn(tokens, VOCABULARY), torch.randint(VOCABULARY, (tokens,))],
    ),
    "log_softmax_top_k": (
        lambda logits: torch.log_softmax(logits, -1).topk(4),
        lambda logits: kernels.log_softmax_top_k(logits, 4),
        lambda tokens: [torch.randn(tokens, VOCABULARY)],
    ),
}


def repeated(function: Callable) -> Callable:
    def calls(*args):
        for _ in range(CALLS):
            result = function(*args)
        return tuple(result) if isinstance(result, tuple) else result

    return calls


of_tokens = pytest.mark.parametrize("shape", [1, 16], ids=["1 token", "16 tokens"])


@of_tokens
@pytest.mark.parametrize("op", OPS)
def bench_small_calls(compare, op, shape, device):
    torchs, ours, make = OPS[op]
    args = tuple(x.to(device) for x in make(shape))
    with torch.no_grad():
        compare({"naive": repeated(torchs), "fused": repeated(ours)}, args)


@of_tokens
@pytest.mark.parametrize("op", [op for op in OPS if op != "log_softmax_top_k"])  # which has no gradient
def bench_small_calls_forward_backward(compare, op, shape, device):
    torchs, ours, make = OPS[op]
    args = tuple(x.to(device).requires_grad_(x.is_floating_point()) for x in make(shape))
    compare({"naive": repeated(forward_backward(torchs)), "fused": repeated(forward_backward(ours))}, args)
