"""How times grow: attention with length, batch and heads, the loss and the choice of tokens with the vocabulary,
residual and LayerNorm with rows. One size of Transformer-base's grows, the others stay.

Attention of L tokens is L² work, so the power to expect is 2, and 1 for everything else; a smaller one means that a
call's fixed cost still counts at the largest size. Naive attention stops at 2,048 tokens, which keep the processor busy
for long enough.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.attention import SDPBackend

from bench import bench_cross_entropy, bench_layer_norm, bench_log_softmax_top_k, shapes
from bench.agreement import forward_backward
from bench.baselines import keep_of_lengths, naive_attention, sdpa, sdpa_backends, sentence_lengths
from bench.bench_attention import tensors
from fused_transformer.kernels import add_layer_norm, attention

HEADS, WIDTH = 8, 64
LENGTHS = [2**i for i in range(6, 15)]  # 64 to 16,384
NAIVE_UP_TO = 2048
FLASH = "sdpa flash"


def with_mask(device: str, keep: torch.Tensor, wrap=lambda function: function) -> dict:
    """SDPA with a mask, on the backend that takes one without writing scores."""
    label = FLASH if device == "cpu" else "sdpa efficient"
    return {label: sdpa(sdpa_backends(device)[label], wrap, attn_mask=keep)}


def tensors_of(batch: int, heads: int, length: int, device: str, grad: bool = False) -> tuple[torch.Tensor, ...]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return tensors(shapes.Attention("", batch, heads, length, length, WIDTH, dtype=dtype), device, grad)


def causal(length: int, device: str, *, grad: bool = False) -> tuple[dict, tuple]:
    """Attention of one sequence, each token over itself and those before it."""
    wrap = forward_backward if grad else lambda function: function
    chosen = {
        "fused": wrap(partial(attention, causal="top_left")),
        FLASH: sdpa(SDPBackend.FLASH_ATTENTION, wrap, is_causal=True),
    }
    if length <= NAIVE_UP_TO:
        keep = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        chosen["naive"] = wrap(partial(naive_attention, keep=keep))
    return chosen, tensors_of(1, HEADS, length, device, grad)


def padded(batch: int, heads: int, length: int, device: str) -> tuple[dict, tuple]:
    """Attention of sentences that fill 60 % of the batch."""
    lengths = sentence_lengths(batch, length, device)
    keep = keep_of_lengths(lengths, length)
    chosen = {"fused": partial(attention, k_lengths=lengths), **with_mask(device, keep)}
    if length <= NAIVE_UP_TO:
        chosen["naive"] = partial(naive_attention, keep=keep)
    return chosen, tensors_of(batch, heads, length, device)


def bench_scaling_attention_causal_length(grow, device):
    grow("attention causal", "length", LENGTHS, partial(causal, device=device), fixed="B1 H8 D64")


def bench_scaling_attention_causal_length_forward_backward(grow, device):
    work = partial(causal, device=device, grad=True)
    grow("attention causal forward backward", "length", LENGTHS[:7], work, fixed="B1 H8 D64")


def bench_scaling_attention_with_lengths_length(grow, device):
    def work(length):
        return padded(2, HEADS, length, device)

    grow("attention with lengths", "length", LENGTHS[:8], work, fixed="B2 H8 D64")


def bench_scaling_attention_with_lengths_batch(grow, device):
    def work(batch):
        return padded(batch, HEADS, 128, device)

    grow("attention with lengths", "batch", [2**i for i in range(8)], work, fixed="H8 L128 D64")


def bench_scaling_attention_with_lengths_heads(grow, device):
    def work(heads):
        return padded(8, heads, 128, device)

    grow("attention with lengths", "heads", [2**i for i in range(8)], work, fixed="B8 L128 D64")


def bench_scaling_cross_entropy_vocabulary(grow, device):
    def work(vocabulary):
        shape = bench_cross_entropy.Logits("", 128, vocabulary)
        implementations = bench_cross_entropy.implementations(shape, forward_backward)
        return implementations, bench_cross_entropy.make(shape, device, grad=True)

    vocabularies = [1000 * 2**i for i in range(8)]
    grow("cross entropy forward backward", "vocabulary", vocabularies, work, fixed="N128")


def bench_scaling_log_softmax_top_k_vocabulary(grow, device):
    def work(vocabulary):
        shape = bench_log_softmax_top_k.Step("", 16, 4, vocabulary)
        return bench_log_softmax_top_k.implementations(shape), bench_log_softmax_top_k.make(shape, device)

    grow("log softmax top k", "vocabulary", [1000 * 2**i for i in range(8)], work, fixed="B16 beams4")


def bench_scaling_add_layer_norm_rows(grow, device):
    def work(rows):
        implementations = {"naive": bench_layer_norm.add_then_norm, "fused": add_layer_norm}
        return implementations, bench_layer_norm.make(shapes.Rows("", rows, 512), device)

    grow("add layer norm", "rows", [2**i for i in range(6, 17)], work, fixed="E512")
