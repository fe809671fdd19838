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
    embedding,
    layer_norm,
    rms_norm,
)
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


CALLS: dict[str, Callable[[], Iterator[tuple[str, Call]]]] = {
    "embedding": embedding_calls,
    "layer_norm": layer_norm_calls,
}
