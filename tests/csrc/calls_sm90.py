"""Calls that go through attention's forward kernel for Hopper (csrc/attention/forward_sm90.cu). See calls.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fused_transformer.kernels import attention_with_lse
from tests import emulated
from tests.inputs import normal

BF16, F16 = torch.bfloat16, torch.float16


@wraps(attention_with_lse)
def on_hopper(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Attention, forward alone; where it runs on CUDA in the emulator, by Hopper's kernel."""
    from fused_transformer.kernels.attention import cuda_sm90

    with torch.no_grad(), cuda_sm90.switched(True), emulated.capability(9, 0):
        return attention_with_lse(*args, **options)


def attention_sm90_calls() -> Iterator[tuple[str, tuple[Callable, dict[str, Tensor], dict[str, Any]]]]:
    def qkv(B, H, Hk, L, S, D, dtype):
        shapes = {"q": (B, H, L, D), "k": (B, Hk, S, D), "v": (B, Hk, S, D)}
        return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}

    # tiles are of 128 queries and 128 keys, in two stages: five tiles use each stage twice, and one a third time
    yield "every_stage_again", (on_hopper, qkv(1, 1, 1, 70, 530, 64, BF16), {})
    yield "causal", (on_hopper, qkv(1, 2, 1, 150, 270, 64, F16), {"causal": "bottom_right"})
    yield "wide_heads", (on_hopper, qkv(1, 1, 1, 130, 300, 128, BF16), {"window": (150, 20)})
    options = {"causal": "top_left", "k_lengths": torch.tensor([140, 0, 20])}
    yield "lengths", (on_hopper, qkv(3, 1, 1, 66, 140, 64, BF16), options)

    tensors = qkv(1, 1, 1, 70, 300, 64, BF16)
    for name in ("k", "v"):
        tensors[name][:, :, 257:] = torch.nan
    yield "nan_where_masked", (on_hopper, tensors, {"k_lengths": torch.tensor([257])})

    tensors = qkv(1, 1, 1, 70, 300, 128, F16)
    tensors["v"][0, 0, [30, 240, 290], [5, 64, 127]] = torch.inf  # seen by some, and by some not
    yield "bad_values", (on_hopper, tensors, {"window": (220, -1), "causal": "bottom_right"})

    packed = {"q": normal(140, 2, 64, dtype=F16)}
    packed |= {name: normal(170, 1, 64, dtype=F16) for name in ("k", "v")}
    packed["v"][165:] = torch.nan  # of nobody, and in the box of the last sequence
    offsets = {"q_offsets": torch.tensor([0, 5, 5, 136]), "k_offsets": torch.tensor([0, 20, 30, 165])}
    yield "packed", (on_hopper, packed, {**offsets, "causal": "top_left"})
