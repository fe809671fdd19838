"""What csrc/attention/*.cu chooses between: kernels by head width and by how many blocks there are, moves of 16 bytes
or of one element, bits of masks, sums of a bias gradient in parts."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import _cuda, attention, attention_with_lse
from fused_transformer.kernels.attention import op
from fused_transformer.kernels.attention.mask import Mask
from tests import emulated
from tests.inputs import FLOATS, case_id, dtype_id, normal, running_on
from tests.inputs import Case as C
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

FEW, MANY = 1, 10_000  # multiprocessors: so few that large tiles fill them, and so many that nothing does


@pytest.fixture(params=[FEW, MANY], ids=["large_tiles", "small_tiles"])
def multiprocessors(request, monkeypatch):
    monkeypatch.setattr(_cuda, "multiprocessors", lambda device: request.param)
    return request.param


def qkv(B=1, H=2, Hk=None, L=70, S=70, D=32, dtype=torch.bfloat16, device="cpu"):
    shapes = {"q": (B, H, L, D), "k": (B, Hk or H, S, D), "v": (B, Hk or H, S, D)}
    return {name: normal(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}


# ---------------------------------------------------------------- kernels

WIDTHS = (8, 32, 40, 64, 72, 96, 104, 128, 136, 256)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_on_large_and_small_tiles(width, multiprocessors, device):
    tensors = qkv(H=1, L=140, S=100, D=width, device=device)
    assert_backend_matches(attention_with_lse, "cuda", tensors, causal="bottom_right")


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_large_and_small_tiles_give_the_same_bits(width, dtype, device, monkeypatch):
    """Or a sequence's result would depend on how many others are in its batch."""
    tensors = qkv(H=2, Hk=1, L=150, S=170, D=width, dtype=dtype, device=device)
    runs = []
    for count in (FEW, MANY):
        monkeypatch.setattr(_cuda, "multiprocessors", lambda device, count=count: count)
        with running_on("cuda"):
            runs.append(run_with_gradients(attention_with_lse, tensors, window=(90, 5), causal="bottom_right"))
    assert_equal(*runs)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_the_order_round(scale, multiprocessors, device):
    keep = torch.rand(70, 70, device=device) < 0.7
    assert_backend_matches(attention_with_lse, "cuda", qkv(device=device), scale=scale, keep=keep)


@pytest.mark.skipif(not emulated.installed(), reason="a device's capability is not for a test to choose")
@pytest.mark.parametrize(("dtype", "widest"), [(torch.float32, 64), (torch.bfloat16, 128)], ids=str)
def test_tiles_that_little_shared_memory_has_no_room_for_are_refused(dtype, widest, monkeypatch):
    monkeypatch.setattr(_cuda, "capability", lambda device: (8, 6))
    mask = Mask(1, 3, 3, None, None, False, (-1, -1), None, None, None)
    for width in (widest, widest + 1):
        x = torch.zeros(1, 1, 3, width, dtype=dtype)
        with emulated.wanted():
            why = op.why_not("cuda", x, x, x, mask, 1.0, 0.0, None)
        assert (why is None) == (width == widest)
        assert why is None or "do not fit the shared memory of compute capability 8.6" in why


# ---------------------------------------------------------------- moves


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("width", [1, 20, 63])
def test_aligned_rows_whose_last_16_bytes_are_not_all_theirs(width, dtype, device):
    """What stands behind a row's end is NaN, and must not come along."""
    tensors = {}
    for name, x in qkv(L=40, D=width, dtype=dtype, device=device).items():
        wide = torch.full((*x.shape[:-1], 64), torch.nan, dtype=dtype, device=device)
        tensors[name] = wide[..., :width]
        tensors[name].copy_(x)
    assert_backend_matches(attention_with_lse, "cuda", tensors, causal="top_left")


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_one_tensor_that_is_not_aligned(which, device):
    tensors = qkv(L=40, device=device)
    flat = torch.empty(tensors[which].numel() + 1, dtype=torch.bfloat16, device=device)
    tensors[which] = flat[1:].view(tensors[which].shape).copy_(tensors[which])
    assert_backend_matches(attention_with_lse, "cuda", tensors)


# ---------------------------------------------------------------- masks

KEEPS = (
    C("every_axis", shape=(2, 4, 70, 130)),
    C("keys", shape=(2, 1, 1, 130)),
    C("queries", shape=(1, 4, 70, 1)),
    C("nothing_but_heads", shape=(1, 4, 1, 1)),
    C("one_key_in_each_word", shape=(2, 1, 70, 130), only=(63, 64, 128)),
)


@pytest.mark.parametrize("case", KEEPS, ids=case_id)
@pytest.mark.parametrize("expanded", [False, True])
def test_bits_of_a_mask(case, expanded, device):
    keep = torch.rand(case["shape"], device=device) < 0.6
    if "only" in case:
        keep[:] = False
        keep[..., list(case["only"])] = True
        keep[:, :, 5] = False
    if expanded:
        keep = keep.expand(2, 4, 70, 130)
    tensors = qkv(B=2, H=4, Hk=2, S=130, device=device)
    assert_backend_matches(attention_with_lse, "cuda", tensors, keep=keep, causal="bottom_right")


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", ["keep", "bias", "window"])
@pytest.mark.parametrize("width", [32, 128, 256])
def test_a_bad_value_reaches_the_queries_that_see_it(width, how, garbage, multiprocessors, device):
    tensors = qkv(H=1, L=140, S=150, D=width, device=device)
    tensors["v"][0, 0, 100, width - 3] = garbage
    seen = torch.rand(140, 150, device=device) < 0.6
    options: dict = {"keep": seen}
    if how == "bias":
        options = {"bias": torch.where(seen, 0.25, -torch.inf)}
    elif how == "window":
        i, j = torch.arange(140, device=device)[:, None], torch.arange(150, device=device)
        seen, options = (j - i).abs() <= 40, {"window": (40, 40)}
    with running_on("cuda"):
        out = attention(**tensors, **options)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 0, :, width - 3] = seen[:, 100]
    assert torch.equal(~out.isfinite(), expected)


def test_a_bad_key_makes_bad_gradients_for_the_queries_that_see_it_alone(multiprocessors, device):
    tensors = qkv(H=1, L=140, S=150, device=device)
    tensors["k"][0, 0, 100, 3] = torch.nan
    keep = torch.rand(140, 150, device=device) < 0.6
    with running_on("cuda"):
        got = run_with_gradients(attention, tensors, keep=keep)
    assert torch.equal(got["dq"][0, 0].isnan().any(-1), keep[:, 100])
    assert torch.equal(got["out"][0, 0].isnan().any(-1), keep[:, 100])


# ---------------------------------------------------------------- bias

BIASES = (
    C("whole", shape=(2, 4, 70, 90)),
    C("every_batch", shape=(1, 4, 70, 90)),
    C("every_head_and_query", shape=(2, 1, 1, 90)),
    C("every_query", shape=(1, 4, 1, 90)),
    C("keys_alone", shape=(1, 1, 1, 90)),
)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", BIASES, ids=case_id)
def test_a_bias_gradient_in_one_part_and_in_many(case, dtype, multiprocessors, device):
    tensors = {**qkv(B=2, H=4, Hk=2, S=90, dtype=dtype, device=device), "bias": normal(*case["shape"], device=device)}
    options = {"k_lengths": torch.tensor([90, 50], device=device), "causal": "top_left"}
    tensors["bias"] = tensors["bias"].to(dtype)
    assert_backend_matches(attention_with_lse, "cuda", tensors, **options)


@pytest.mark.parametrize("shape", [(2, 4, 70, 1), (1, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_a_bias_that_all_keys_share_changes_nothing(shape, multiprocessors, device):
    """Its gradient is 0, as a softmax's are in sum: no key is left out of it."""
    tensors = {**qkv(B=2, H=4, S=90, dtype=torch.float32, device=device), "bias": normal(*shape, device=device)}
    with running_on("cuda"):
        got = run_with_gradients(attention, tensors, causal="bottom_right")
    assert got["dbias"].shape == shape and float(got["dbias"].abs().max()) < 1e-4


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_a_bias_of_another_dtype(dtype, bias_dtype, device):
    tensors = {**qkv(L=40, dtype=dtype, device=device), "bias": normal(40, 70, dtype=bias_dtype, device=device)}
    got = assert_backend_matches(attention, "cuda", tensors)
    assert got["dbias"].dtype == bias_dtype


@pytest.mark.parametrize("layout", ["aligned", "offset", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_bias_of_any_strides(layout, dtype, device):
    bias = normal(2, 40, 64, dtype=dtype, device=device)
    if layout == "offset":
        bias = torch.zeros(bias.numel() + 1, dtype=dtype, device=device)[1:].view(bias.shape).copy_(bias)
    elif layout == "transposed":
        bias = bias.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = {**qkv(L=40, S=64, dtype=torch.bfloat16, device=device), "bias": bias}
    assert_backend_matches(attention, "cuda", tensors)
