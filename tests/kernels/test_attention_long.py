"""Attention at the lengths of real models, where a sum has so many terms that its order shows in the last digits."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import attention
from tests.inputs import Case, case_id, normal
from tests.oracle import assert_backend_matches

# Whole heads of the benchmarks' models. The interpreter of the Triton kernels would take minutes for each.
CASES = (
    Case("grouped_causal", q=(1, 32, 512, 64), k=(1, 8, 512, 64), causal="top_left"),
    Case("grouped_causal_wide", q=(1, 8, 512, 128), k=(1, 2, 512, 128), causal="top_left"),
    Case("causal", q=(1, 4, 1024, 64), k=(1, 4, 1024, 64), causal="top_left"),
    Case("unmasked", q=(1, 2, 640, 64), k=(1, 2, 2048, 64), causal=False),
)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_long_sums_stay_within_twice_the_error_of_plain_torch(case, backend):
    tensors = {"q": normal(*case["q"]), "k": normal(*case["k"]), "v": normal(*case["k"])}
    assert_backend_matches(attention, backend, tensors, causal=case["causal"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_long_sums_on_a_gpu(case, backend):
    device = "cuda"
    tensors = {"q": normal(*case["q"], device=device), "k": normal(*case["k"], device=device)}
    tensors["v"] = normal(*case["k"], device=device)
    assert_backend_matches(attention, backend, tensors, causal=case["causal"])
