"""Calls of attention whose Triton kernels tests/offline.py compiles: every kernel and dtype."""

from __future__ import annotations

from functools import partial

import torch

from fused_transformer.kernels import attention, attention_weights

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def qkv(dtype, B, H, Hk, L, S, D):
    # the layout of a model's projections: (B, L, H, D) in memory
    make = partial(torch.empty, dtype=dtype, requires_grad=True)
    return make(B, L, H, D).transpose(1, 2), *(make(B, S, Hk, D).transpose(1, 2) for _ in "kv")


def train(dtype, *, B=4, H=8, Hk=8, L=512, S=512, D=64, bias=None, **options):
    """Forward and backward. bias: its shape."""
    q, k, v = qkv(dtype, B, H, Hk, L, S, D)
    if bias:
        options["bias"] = torch.empty(bias, dtype=dtype, requires_grad=True)
    attention(q, k, v, **options).sum().backward()


def packed():
    q, k, v = (torch.empty(512, 8, 64, dtype=BRAIN, requires_grad=True) for _ in "qkv")
    attention(q, k, v, q_offsets=torch.tensor([0, 100, 512]), causal="top_left").sum().backward()


def weights():
    q, k, _ = (x.detach() for x in qkv(BRAIN, 4, 8, 8, 512, 512, 64))
    attention_weights(q, k, torch.empty(4, 8, 512))


def lengths(count, longest):
    return torch.full((count,), longest)


JOBS = {
    "D=64 float32": partial(train, FULL),
    "D=128 float32": partial(train, FULL, D=128),
    "D=256 float32": partial(train, FULL, D=256),
    "D=64 float16": partial(train, HALF),
    "D=64 bfloat16": partial(train, BRAIN),
    "D=128 bfloat16": partial(train, BRAIN, D=128),
    "D=256 bfloat16": partial(train, BRAIN, D=256),
    "causal, grouped queries D=64 bfloat16": partial(train, BRAIN, H=32, causal="bottom_right"),
    "causal, lengths D=128 bfloat16": partial(train, BRAIN, D=128, causal="bottom_right", k_lengths=lengths(4, 512)),
    "keep D=64 bfloat16": partial(train, BRAIN, keep=torch.empty(4, 1, 512, 512, dtype=torch.bool)),
    "keep over keys D=64 bfloat16": partial(train, BRAIN, keep=torch.empty(4, 1, 1, 512, dtype=torch.bool)),
    "bias over keys D=128 bfloat16": partial(train, BRAIN, D=128, bias=(4, 1, 1, 512)),
    "bias, window, dropout D=64 bfloat16": partial(train, BRAIN, bias=(1, 8, 512, 512), window=(128, 0), dropout_p=0.1),
    "packed D=64 bfloat16": packed,
    "weights bfloat16": weights,
}

# B, L, S: batches and lengths of any kind, 1 and primes among them.
SIZES = (
    (3, 70, 90), (1, 64, 64), (2, 17, 17), (5, 31, 33), (7, 128, 128), (16, 100, 99), (1, 255, 256), (64, 48, 64),
    (31, 7, 16), (2, 513, 500), (1, 1023, 1024), (4, 13, 1201), (8, 1, 77), (6, 77, 1), (9, 192, 191), (11, 65, 65),
    (1, 1, 1), (2, 1000, 1000), (12, 320, 240), (10, 2, 3),
)  # fmt: skip


def vary(index: int):
    """Training with lengths, causal and a mask over keys, for another batch and other lengths."""
    B, L, S = SIZES[index]
    keep = torch.empty(B, 1, 1, S, dtype=torch.bool)
    train(BRAIN, B=B, L=L, S=S, causal="bottom_right", k_lengths=lengths(B, S), keep=keep)
