"""Random combinations of every option of decode_attention; see tests/fuzz.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from fused_transformer.kernels.decode_attention import op
from tests import fuzz
from tests.kernels.decode_attention_cases import BACKENDS, assert_right

calls = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
        "B": st.integers(1, 3),
        "R": st.integers(1, 5),
        "Hk": st.integers(1, 2),
        "group": st.sampled_from([1, 1, 2, 5, 17]),
        "L": st.sampled_from([1, 1, 2, 3, 5, 18]),
        "C": st.sampled_from([1, 2, 16, 63, 65, 130, 256, 257, 513, 700]),
        "D": st.sampled_from([1, 3, 8, 16, 33, 64, 130]),
        "causal": st.booleans(),
        "lengths": st.sampled_from([None, torch.int32, torch.int64]),
        "rows": st.sampled_from([None, "shared", "table"]),
        "integers": st.sampled_from([torch.int32, torch.int64]),
        "scale": st.sampled_from([None, None, 1.0, -0.3]),
    }
)


def make(call: dict, device: str = "cpu") -> tuple[dict, dict]:
    """The tensors and options of a drawn call: `make(dict(seed=…, …))` repeats a failure."""
    generator = torch.Generator().manual_seed(call["seed"])
    B, C, dtype = call["B"], call["C"], getattr(torch, call["dtype"])
    R = B if call["rows"] is None else call["R"]

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def integers(stop, shape, dtype):
        return torch.randint(0, stop, shape, generator=generator).to(dtype).to(device)

    cache = (R, call["Hk"], C, call["D"])
    tensors = {"q": normal(B, call["Hk"] * call["group"], call["L"], call["D"])}
    tensors |= {"k_cache": normal(*cache), "v_cache": normal(*cache)}
    options = {"causal": call["causal"], "scale": call["scale"], "lengths": None}
    if call["lengths"]:
        options["lengths"] = integers(C + 1, (B,), call["lengths"])
    if call["rows"]:
        options["rows"] = integers(R, (B,) if call["rows"] == "shared" else (B, C), call["integers"])
    return tensors, options


@fuzz.fuzz
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_matches_the_reference(backend, device):
    if isinstance(op.module(backend), str):
        pytest.skip(f"decode_attention, {backend}: {op.module(backend)}")

    # Triton's interpreter and compiler and the CUDA emulator take seconds each
    examples = 100 if backend == "cpu" else 25 if device == "cpu" else 10

    def check(call):
        tensors, options = make(call, device)
        assert_right(backend, tensors, any_call=True, **options)

    fuzz.run(calls, check, examples)
