"""Random combinations of every option of attention; see tests/fuzz.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from fused_transformer.kernels import attention_with_lse
from fused_transformer.kernels.attention import op
from tests import fuzz

BACKENDS = [name for name in op.order if name != "reference"]

calls = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
        "B": st.integers(1, 2),
        "Hk": st.integers(1, 2),
        "group": st.integers(1, 2),
        "L": st.sampled_from([1, 2, 5, 16, 17, 33, 49, 64, 100]),
        "S": st.sampled_from([1, 3, 16, 63, 64, 65, 130]),
        "D": st.sampled_from([1, 3, 8, 16, 33, 64]),
        "causal": st.sampled_from([False, False, "top_left", "bottom_right"]),
        "window": st.sampled_from([None, None, (0, 0), (3, -1), (-1, 5), (40, 30)]),
        "lengths": st.booleans(),
        "keep": st.sampled_from([None, None, "B11S", "LS", "BHLS", "1HLS", "B1L1"]),
        "kept": st.sampled_from([0.1, 0.5, 0.95]),
        "bias": st.sampled_from([None, None, "B11S", "LS", "BHLS", "1HLS", "HL1"]),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.3]),
    }
)


def make(call: dict, device: str = "cpu") -> tuple[dict, dict]:
    """The tensors and options of a drawn call: `make(dict(seed=…, …))` repeats a failure."""
    generator = torch.Generator().manual_seed(call["seed"])
    dtype = getattr(torch, call["dtype"])
    sizes = {"B": call["B"], "H": call["Hk"] * call["group"], "L": call["L"], "S": call["S"], "1": 1}

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    q_shape, k_shape = (sizes["B"], sizes["H"], sizes["L"], call["D"]), (sizes["B"], call["Hk"], sizes["S"], call["D"])
    tensors = {"q": normal(*q_shape), "k": normal(*k_shape), "v": normal(*k_shape)}
    options: dict = {"causal": call["causal"], "window": call["window"], "dropout_p": call["dropout_p"]}
    if call["lengths"]:
        options["k_lengths"] = torch.randint(0, sizes["S"] + 1, (sizes["B"],), generator=generator).to(device)
    if call["keep"]:
        shape = [sizes[letter] for letter in call["keep"]]
        options["keep"] = (torch.rand(shape, generator=generator) < call["kept"]).to(device)
    if call["bias"]:
        bias = normal(*(sizes[letter] for letter in call["bias"]))
        tensors["bias"] = bias.masked_fill((torch.rand(bias.shape, generator=generator) < 0.1).to(device), -torch.inf)
    if call["dropout_p"]:
        options["seed"] = torch.randint(-(2**62), 2**62, (1,), generator=generator).to(device)
    return tensors, options


@fuzz.fuzz
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_matches_the_reference(backend, device):
    if isinstance(op.module(backend), str):
        pytest.skip(f"attention, {backend}: {op.module(backend)}")

    def check(call):
        tensors, options = make(call, device)
        fuzz.assert_call_matches(attention_with_lse, backend, tensors, logarithm="out1", **options)

    # Triton's interpreter takes a second for a kernel's millisecond, its compiler seconds for each new kind of call.
    examples = 40 if backend != "triton" else 20 if device == "cpu" else 5
    fuzz.run(calls, check, examples)
