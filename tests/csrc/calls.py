"""Small calls that together go through every CUDA kernel of an op: what tests/csrc/test_schedules.py runs under each
schedule of the emulator and under the sanitizers, and what must notice each bug that mutations.py plants.

A call is a public function, its tensors and its options. Sizes are small, since a thread sanitizer looks on, and chosen
by the kernels' own limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_transformer.kernels import (
    add_layer_norm_with_total,
    add_rms_norm_with_total,
    attention_weights,
    attention_with_lse,
    bias_act,
    cross_entropy,
    decode_attention_with_lse,
    embedding,
    layer_norm,
    log_softmax_top_k,
    rms_norm,
)
from tests.csrc.calls_sm90 import attention_sm90_calls
from tests.inputs import as_offset, as_strided, normal

Call = tuple[Callable, dict[str, Tensor], dict[str, Any]]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def layer_norm_calls() -> Iterator[tuple[str, Call]]:
    # rows, columns, dtype: each count of columns is taken by another kernel (csrc/layer_norm/forward.cu, backward.cu)
    sizes = {
        "a_warp_a_row": (37, 200, BF16),
        "two_vectors_a_lane": (13, 264, BF16),
        "the_widest_warp_row": (13, 1024, F32),
        "a_block_a_row": (6, 1032, F16),
        "a_wide_block_row": (5, 4100, F32),
        "rows_not_held": (5, 8200, F32),
        "one_element_at_a_time": (37, 67, F32),
        "rows_not_held_and_not_aligned": (6, 301, F16),
    }
    seed = torch.tensor([2**40 + 17])
    for name, (rows, cols, dtype) in sizes.items():
        tensors = {key: normal(rows, cols, dtype=dtype) for key in ("x", "residual")}
        tensors |= {key: normal(cols, dtype=dtype) for key in ("weight", "bias", "x_bias")}
        yield name, (add_layer_norm_with_total, tensors, {"dropout_p": 0.3, "seed": seed})
    x = normal(9, 96, dtype=BF16)
    yield "alone", (layer_norm, {"x": x, "weight": normal(96), "bias": normal(96)}, {})
    yield "rms_alone", (rms_norm, {"x": as_strided(x)}, {})
    tensors = {"x": as_offset(normal(9, 96)), "residual": normal(9, 96), "weight": normal(96)}
    yield "rms", (add_rms_norm_with_total, tensors, {})
    tensors = {"x": normal(9, 96), "residual": as_offset(normal(9, 96))}
    yield "an_unaligned_residual", (add_layer_norm_with_total, tensors, {})
    yield "no_rows", (layer_norm, {"x": normal(0, 96), "weight": normal(96), "bias": normal(96)}, {})


def embedding_calls() -> Iterator[tuple[str, Call]]:
    seed = torch.tensor([2**40 + 17])
    dropout = {"dropout_p": 0.3, "seed": seed}
    tokens = torch.randint(0, 20, (3, 7))
    # vocabulary, columns, dtype: beyond 512 columns there is a second strip (csrc/embedding/forward.cu)
    sizes = {
        "a_vector_at_a_time": (20, 200, BF16),
        "two_strips": (20, 1032, F16),
        "one_element_at_a_time": (20, 67, F32),
        "two_strips_of_elements": (20, 515, F32),
    }
    for name, (vocabulary, cols, dtype) in sizes.items():
        tensors = {"tokens": tokens, "table": normal(vocabulary, cols, dtype=dtype)}
        yield name, (embedding, tensors, {"padding_idx": 3, "start": 5, **dropout})
    tensors = {"tokens": tokens.int(), "table": as_strided(normal(20, 40))}
    yield "a_strided_table_and_starts", (embedding, tensors, {"start": torch.tensor([9, 0, 200])})
    tensors = {"tokens": tokens, "table": normal(20, 40, dtype=BF16)}
    yield "positions_too_far_out_for_a_table", (embedding, tensors, {"start": torch.tensor([9, 10**8, 200])})
    # runs of equal tokens are cut at every 32: one that begins and ends within others' chunks, and one over many
    runs = torch.cat([torch.full((count,), token) for token, count in enumerate((5, 40, 3, 330, 1, 70))])
    tensors = {"tokens": runs[torch.randperm(len(runs))], "table": normal(6, 36, dtype=BF16)}
    yield "runs_over_chunks", (embedding, tensors, {"positions": None, **dropout})


def bias_act_calls() -> Iterator[tuple[str, Call]]:
    dropout = {"dropout_p": 0.3, "seed": torch.tensor([2**40 + 17])}
    # rows, columns, dtype, activation: a block has 128 threads side by side or fewer (csrc/bias_act)
    sizes = {
        "two_strips": (37, 1032, BF16, "gelu"),
        "many_rows_at_once": (301, 24, F16, "gelu_tanh"),
        "one_element_at_a_time": (37, 67, F32, "gelu"),
        "two_strips_of_elements": (11, 131, BF16, "relu"),
    }
    for name, (rows, cols, dtype, activation) in sizes.items():
        tensors = {"x": normal(rows, cols, dtype=dtype), "bias": normal(cols, dtype=dtype)}
        yield name, (bias_act, tensors, {"activation": activation, **dropout})
    tensors = {"x": as_strided(normal(9, 96, dtype=BF16)), "bias": normal(96)}
    yield "a_float32_bias", (bias_act, tensors, {"activation": "gelu"})
    yield "no_bias", (bias_act, {"x": as_offset(normal(9, 96))}, {})


def cross_entropy_calls() -> Iterator[tuple[str, Call]]:
    # rows, columns, dtype: above 1024 columns a block takes a row, in chunks of 4096 going back (csrc/cross_entropy)
    sizes = {
        "a_warp_a_row": (9, 200, BF16),
        "a_warp_a_row_and_not_aligned": (9, 67, F32),
        "a_block_a_row": (3, 4104, BF16),
        "a_block_a_row_and_not_aligned": (3, 4099, F16),
        "carried_over": (2, 5000, F32),
    }
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
    for name, (rows, cols, dtype) in sizes.items():
        targets = torch.randint(0, cols, (rows,))
        targets[1] = -100
        rising = torch.linspace(-20, 20, cols)  # the maximum moves from step to step
        yield name, (cross_entropy, {"logits": (normal(rows, cols) + rising).to(dtype), "targets": targets}, options)
    tensors = {"logits": as_strided(normal(9, 96)), "targets": torch.randint(0, 96, (9,), dtype=torch.int32)}
    yield "plain", (cross_entropy, tensors, {})


def decode_attention_calls() -> Iterator[tuple[str, Call]]:
    function = torch.no_grad()(decode_attention_with_lse)
    # heads, key heads, queries, positions, columns, dtype: more than 512 positions are two splits or more
    sizes = {
        "one_row": (2, 2, 1, 70, 16, F32),
        "a_draft_of_grouped_queries": (6, 1, 3, 37, 96, BF16),
        "one_row_of_the_widest_head": (1, 1, 1, 21, 256, F16),
        "one_element_at_a_time": (2, 1, 2, 40, 67, F32),
        "splits": (2, 1, 2, 530, 24, BF16),
    }
    for name, (heads, heads_k, queries, positions, width, dtype) in sizes.items():
        tensors = {"q": normal(3, heads, queries, width, dtype=dtype)}
        tensors |= {key: normal(3, heads_k, positions, width, dtype=dtype) for key in ("k_cache", "v_cache")}
        tensors["v_cache"][1, :, positions - 10] = torch.nan  # the last query's newest key, unseen by those before it
        lengths = torch.tensor([0, positions - 9, positions])
        table = torch.randint(0, 3, (3, positions), dtype=torch.int32)
        yield name, (function, tensors, {"lengths": lengths})
        yield f"{name}_by_table", (function, tensors, {"lengths": lengths, "rows": table})


def attention_calls() -> Iterator[tuple[str, Call]]:
    def qkv(B, H, Hk, L, S, D, dtype):
        shapes = {"q": (B, H, L, D), "k": (B, Hk, S, D), "v": (B, Hk, S, D)}
        return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}

    seed = torch.tensor([2**33 - 5])
    # by head width, of which each has kernels of its own (csrc/attention/device_launch.cuh)
    yield "plain", (attention_with_lse, qkv(1, 2, 2, 70, 100, 32, BF16), {})
    options = {"causal": "bottom_right", "k_lengths": torch.tensor([70, 0, 33])}
    yield "causal_with_lengths", (attention_with_lse, qkv(3, 1, 1, 40, 70, 64, F16), options)
    yield "unaligned_width", (attention_with_lse, qkv(1, 1, 1, 33, 65, 81, BF16), {"causal": "top_left"})
    yield "wide_heads", (attention_with_lse, qkv(1, 1, 1, 33, 70, 128, BF16), {"window": (20, 5)})
    yield "widest_heads", (attention_with_lse, qkv(1, 1, 1, 17, 40, 256, F16), {})

    tensors = qkv(2, 4, 2, 40, 75, 64, BF16)
    tensors["bias"] = normal(1, 4, 40, 75, dtype=BF16)
    options = {"keep": torch.rand(2, 1, 40, 75) < 0.7, "window": (60, 30), "dropout_p": 0.2, "seed": seed}
    yield "all_at_once", (attention_with_lse, tensors, options)
    tensors = qkv(1, 2, 1, 20, 70, 33, F32)
    tensors["bias"] = normal(20, 70)
    options = {"keep": torch.rand(1, 2, 20, 70) < 0.7, "dropout_p": 0.2, "seed": seed}
    yield "float32", (attention_with_lse, tensors, options)
    yield "float32_wide_heads", (attention_with_lse, qkv(1, 1, 1, 10, 40, 130, F32), {"causal": "bottom_right"})

    tensors = qkv(2, 1, 1, 20, 70, 32, BF16)
    masked = torch.arange(70) % 7 == 3
    for name in ("k", "v"):
        tensors[name][:, :, masked] = torch.nan
    yield "nan_where_masked", (attention_with_lse, tensors, {"keep": ~masked.expand(20, 70)})

    packed = {name: normal(60, 2, 16, dtype=F16) for name in ("q", "k", "v")}
    options = {"q_offsets": torch.tensor([0, 33, 33, 57]), "causal": "top_left"}
    yield "packed", (attention_with_lse, packed, options)

    def weights(q, k):
        _, lse = attention_with_lse(q, k, k, causal="bottom_right")
        return attention_weights(q, k, lse, causal="bottom_right")

    tensors = qkv(1, 2, 2, 20, 70, 48, BF16)
    yield "weights", (weights, {"q": tensors["q"], "k": tensors["k"]}, {})


def log_softmax_top_k_calls() -> Iterator[tuple[str, Call]]:
    function = torch.no_grad()(log_softmax_top_k)
    # rows, beams, columns, kept, dtype: above 4096 columns there are parts, above 32 kept a lane holds two
    sizes = {
        "a_part": (6, 2, 700, 8, F32),
        "parts": (2, 2, 4200, 40, BF16),
        "one_element_at_a_time": (6, 3, 67, 10, F16),
    }
    for name, (rows, beams, cols, k, dtype) in sizes.items():
        tensors = {"logits": normal(rows, cols, dtype=dtype), "addend": normal(rows)}
        yield name, (function, tensors, {"k": k, "beams": beams})
    # torch's stable sorts in the reference say which of equal ones come first
    equal = torch.randint(3, (600,)).float().repeat(5, 1)
    yield "ties", (function, {"logits": equal}, {"k": 50, "beams": 5})
    yield "rising", (function, {"logits": torch.arange(520.0).repeat(2, 1)}, {"k": 33, "beams": 2})


CALLS: dict[str, Callable[[], Iterator[tuple[str, Call]]]] = {
    "bias_act": bias_act_calls,
    "cross_entropy": cross_entropy_calls,
    "decode_attention": decode_attention_calls,
    "embedding": embedding_calls,
    "attention": attention_calls,
    "attention_sm90": attention_sm90_calls,
    "layer_norm": layer_norm_calls,
    "log_softmax_top_k": log_softmax_top_k_calls,
}
