"""Hopper's own forward kernel of attention (csrc/attention/forward_sm90.cu), in the emulator or on a GPU: all that it
takes, by the same bound as every backend; and that what it refuses goes to the other kernel."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fused_transformer.kernels import _cuda, attention, attention_with_lse
from fused_transformer.kernels.attention.mask import make_mask
from tests import emulated
from tests.inputs import Case, as_expanded, as_offset, case_id, dtype_id, normal, running_on
from tests.kernels.test_attention import MASKS, SHAPES, build
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

if not emulated.installed() and not torch.cuda.is_available():
    pytest.skip("neither a CUDA device nor a compiler for the emulator", allow_module_level=True)

from fused_transformer.kernels.attention import cuda_sm90

# on a CPU all of it is the emulator
pytestmark = [pytest.mark.emulated] if emulated.installed() else []

BF16, F16 = torch.bfloat16, torch.float16
OURS, OTHER = "attention_forward_sm90_cuda", "attention_forward_cuda"


@pytest.fixture
def hopper(device):
    """Where the kernel runs and is switched on: the emulator as a device of compute capability 9.0, or a GPU."""
    if device == "cpu" and not emulated.installed():
        pytest.skip("there is a CUDA device, on which these tests run")
    with cuda_sm90.switched(True), emulated.capability(9, 0) if device == "cpu" else nullcontext():
        why = cuda_sm90.why_not_here(torch.device(device))
        if why is not None:
            pytest.skip(why)
        yield device


@pytest.fixture
def launched(monkeypatch):
    """The names of the forward kernels launched, in order."""
    names, launcher = [], _cuda.on_current_stream

    def noting(function, x):
        names.append(function.__name__)
        return launcher(function, x)

    monkeypatch.setattr(_cuda, "on_current_stream", noting)
    return names


def qkv(B=1, H=1, Hk=None, L=70, S=70, D=64, dtype=BF16, device="cpu"):
    shapes = {"q": (B, H, L, D), "k": (B, Hk or H, S, D), "v": (B, Hk or H, S, D)}
    return {name: normal(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}


# ---------------------------------------------------------------- cases of every backend, and of its own tiles

EVERY_BACKENDS = [case for case in (*SHAPES, *MASKS) if not {"keep", "bias"} & set(case)]
# 128 queries a block, 64 of them a consumer; 128 keys a tile, two stages
OWN = (
    Case("a_tile", B=1, H=1, L=128, S=128),
    Case("below_a_tile", B=1, H=1, L=127, S=127),
    Case("above_a_tile", B=1, H=1, L=129, S=129),
    Case("one_consumer", B=1, H=1, L=64, S=65),
    Case("every_stage_again", B=1, H=1, L=65, S=520),
    Case("causal_tiles", B=1, H=1, L=300, S=300, causal="top_left"),
    Case("causal_of_grouped_heads", B=1, H=4, Hk=2, L=130, S=260, causal="bottom_right"),
    Case("a_consumer_sees_less", B=1, H=1, L=200, S=190, causal="bottom_right"),
    Case("first_tiles_unseen", B=1, H=1, L=400, S=400, window=(30, 10)),
    Case("lengths_around_tiles", B=3, H=1, L=66, S=260, k_lengths=(129, 256, 0)),
    Case("lengths_and_window", B=2, H=1, L=140, S=300, k_lengths=(300, 131), window=(150, 3), causal="bottom_right"),
)


def case_of_width(case: Case, width: int) -> Case:
    return Case(case.name, **{**case, "D": width})


@pytest.mark.parametrize(("width", "dtype"), [(64, BF16), (128, F16)], ids=["64-bf16", "128-f16"])
@pytest.mark.parametrize("case", [*EVERY_BACKENDS, *OWN], ids=case_id)
def test_matches_the_reference(case, width, dtype, hopper, launched):
    tensors, options = build(case_of_width(case, width), dtype, hopper)
    assert_backend_matches(attention_with_lse, "cuda", tensors, **options)
    assert launched.count(OURS) == int(tensors["k"].shape[2] > 0) and OTHER not in launched


@pytest.mark.parametrize(("width", "dtype"), [(128, BF16), (64, F16)], ids=["128-bf16", "64-f16"])
@pytest.mark.parametrize("case", [OWN[4], OWN[6], OWN[-1]], ids=case_id)
def test_the_other_pairs_of_width_and_dtype(case, width, dtype, hopper):
    tensors, options = build(case_of_width(case, width), dtype, hopper)
    assert_backend_matches(attention_with_lse, "cuda", tensors, **options)


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_scale(scale, hopper):
    assert_backend_matches(attention_with_lse, "cuda", qkv(S=200, device=hopper), scale=scale)


@pytest.mark.parametrize("size", [0.0, 40.0])
def test_large_and_equal_scores(size, hopper):
    """Scores of thousands: the maximum moves far from tile to tile."""
    tensors = qkv(L=40, S=300, device=hopper)
    tensors["q"] = tensors["q"] * size
    tensors["k"] = tensors["k"] * torch.linspace(0.1, 1, 300, device=hopper, dtype=BF16)[:, None]
    got = assert_backend_matches(attention_with_lse, "cuda", tensors)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("layout", ["heads_side_by_side", "strided", "one_row_each"])
def test_strides_that_tma_takes(layout, hopper, launched):
    if layout == "heads_side_by_side":
        q, k, v = normal(2, 150, 3, 2, 64, dtype=BF16, device=hopper).permute(2, 0, 3, 1, 4)
        tensors = {"q": q, "k": k, "v": v}
    elif layout == "strided":
        tensors = {}
        for name, x in qkv(B=2, L=70, S=140, device=hopper).items():
            wide = torch.full((*x.shape[:-1], 80), torch.nan, dtype=BF16, device=hopper)
            tensors[name] = wide[..., 8:72]
            tensors[name].copy_(x)
    else:
        tensors = qkv(L=1, S=1, device=hopper)
    assert_backend_matches(attention_with_lse, "cuda", tensors, causal="top_left")
    assert OURS in launched


# ---------------------------------------------------------------- masked garbage


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["k_lengths", "causal", "window"])
def test_what_masked_keys_and_values_hold_never_leaks(how, garbage, hopper):
    clean = qkv(B=2, L=150, S=300, device=hopper)
    position = torch.arange(300, device=hopper)
    options: dict = {}
    if how == "k_lengths":
        options["k_lengths"] = torch.tensor([129, 250], device=hopper)
        masked = position >= options["k_lengths"][:, None, None]
    elif how == "causal":
        options["causal"], masked = "top_left", (position >= 150).expand(2, 1, 300)
    else:
        options["window"], masked = (20, 10), (position >= 160).expand(2, 1, 300)
    dirty = {**clean, **{name: torch.where(masked[..., None], garbage, clean[name]) for name in "kv"}}
    with running_on("cuda"):
        got, expected = (run_with_gradients(attention_with_lse, x, **options) for x in (dirty, clean))
    assert_equal(got, expected)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("key", [100, 140, 299])
@pytest.mark.parametrize(
    "options", [{"causal": "bottom_right"}, {"window": (130, 40), "causal": "bottom_right"}], ids=str
)
def test_a_bad_value_reaches_the_queries_that_see_it(options, key, garbage, hopper):
    tensors = qkv(L=200, S=300, D=128, device=hopper)
    tensors["v"][0, 0, key, 125] = garbage
    with running_on("cuda"):
        out = attention(**tensors, **options)
    behind = torch.arange(200, device=hopper) + 100 - key  # how far each query's position is behind the key
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 0, :, 125] = (behind >= 0) & (behind <= options.get("window", (1000,))[0])
    assert torch.equal(~out.isfinite(), expected)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_a_bad_query_or_key_stays_where_it_is_seen(garbage, hopper):
    tensors = qkv(L=140, S=150, device=hopper)
    tensors["q"][0, 0, 7, 3] = torch.nan
    tensors["k"][0, 0, 100, 3] = garbage
    with running_on("cuda"):
        out = attention(**tensors, causal="top_left")
    bad = (~out.isfinite()).any(-1)[0, 0]
    assert bad[7] and not bad[:7].any() and not bad[8:100].any()
    if garbage is torch.nan:
        assert bad[100:].all()


# ---------------------------------------------------------------- packing, batches, bits


@pytest.mark.parametrize(
    "options", [{}, {"causal": "top_left"}, {"causal": "bottom_right"}, {"window": (50, 9)}], ids=str
)
def test_packed_and_padded_agree_bit_for_bit(options, hopper, launched):
    q_lengths, k_lengths = [13, 150, 1, 0, 129], [140, 9, 30, 5, 200]
    q = [normal(n, 2, 64, dtype=BF16, device=hopper) for n in q_lengths]
    k = [normal(n, 1, 64, dtype=BF16, device=hopper) for n in k_lengths]
    v = [normal(n, 1, 64, dtype=BF16, device=hopper) for n in k_lengths]
    offsets = [torch.tensor([0, *n], device=hopper).cumsum(0) for n in (q_lengths, k_lengths)]
    with running_on("cuda"):
        # what lies beyond the last sequence is nobody's
        packed = [torch.cat([*x, torch.full_like(x[0], torch.nan)]) for x in (q, k, v)]
        out, lse = attention_with_lse(*packed, q_offsets=offsets[0], k_offsets=offsets[1], **options)
        for b, n in enumerate(q_lengths):
            if n:
                alone = [x[b].transpose(0, 1)[None] for x in (q, k, v)]
                padded = [torch.cat([x, torch.full_like(x, torch.nan)], 2) for x in alone[1:]]
                lengths = torch.tensor([k_lengths[b]], device=hopper)
                out_p, lse_p = attention_with_lse(alone[0], *padded, k_lengths=lengths, **options)
                first = int(offsets[0][b])
                assert_equal(out[first : first + n], out_p[0].transpose(0, 1))
                assert_equal(lse[first : first + n], lse_p[0].transpose(0, 1))
    assert OURS in launched and OTHER not in launched


def test_a_row_does_not_depend_on_the_rest_of_the_batch(hopper):
    tensors = qkv(B=3, H=2, L=150, S=270, device=hopper)
    with running_on("cuda"):
        whole = attention_with_lse(**tensors)
        alone = attention_with_lse(**{name: x[1:2, :, : (50 if name == "q" else 270)] for name, x in tensors.items()})
        again = attention_with_lse(**tensors)
    assert_equal(alone[0], whole[0][1:2, :, :50])
    assert_equal(alone[1], whole[1][1:2, :, :50])
    assert_equal(again, whole)


# ---------------------------------------------------------------- who is launched

REFUSED = (
    Case("float32", why="float32 does not go through wgmma", dtype=torch.float32),
    Case("another_width", why="the head width is neither 64 nor 128", D=96),
    Case("keep", why="keep masks are left", keep=True),
    Case("bias", why="a bias is left", bias=True),
    Case("dropout", why="dropout is left", dropout_p=0.5),
    Case("scale", why="a scale that is not above 0", scale=-1.0),
    Case("unaligned", why="rows that do not begin at multiples of 16 bytes", layout=as_offset),
    Case("expanded", why="expanded along an axis", layout=as_expanded),
)


@pytest.mark.parametrize("case", REFUSED, ids=case_id)
def test_what_it_refuses_goes_to_the_other_kernel_and_says_why(case, hopper, launched):
    tensors = qkv(B=2, L=20, S=30, D=case.get("D", 64), dtype=case.get("dtype", BF16), device=hopper)
    tensors["k"] = case.get("layout", lambda x: x)(tensors["k"])
    options = {}
    if "keep" in case:
        options["keep"] = torch.rand(20, 30, device=hopper) < 0.7
    if "bias" in case:
        tensors["bias"] = normal(20, 30, device=hopper)
    if "dropout_p" in case:
        options |= {"dropout_p": 0.5, "seed": torch.tensor([5], device=hopper)}
    if "scale" in case:
        options["scale"] = case["scale"]
    assert_backend_matches(attention_with_lse, "cuda", tensors, **options)
    assert OTHER in launched and OURS not in launched
    none = dict.fromkeys(("k_lengths", "q_offsets", "k_offsets", "window"))
    masks = {"keep": options.get("keep"), "bias": tensors.get("bias"), "causal": False, **none}
    q, k, v = (tensors[name] for name in "qkv")
    dropout = options.get("dropout_p", 0.0), options.get("seed")
    why = cuda_sm90.why_not_of_call(q, k, v, make_mask(q, k, **masks), options.get("scale", 0.1), *dropout)
    assert why is not None and case["why"] in why


@pytest.mark.skipif(not emulated.installed(), reason="a device's capability is not for a test to choose")
@pytest.mark.parametrize(("capability", "words"), [((8, 0), "capability 8.0"), ((10, 0), "capability 10.0")])
def test_other_devices_take_the_other_kernel(capability, words, launched):
    with cuda_sm90.switched(True), emulated.capability(*capability), running_on("cuda"):
        attention(**qkv(L=5, S=5))
        assert words in cuda_sm90.why_not_here(torch.device("cpu"))
    assert launched == [OTHER]


@pytest.mark.skipif(not emulated.installed(), reason="a device's capability is not for a test to choose")
def test_a_build_without_it_takes_the_other_kernel(launched, monkeypatch):
    monkeypatch.setattr(type(cuda_sm90._C), "cuda_archs", "sm_80;compute_80")
    with cuda_sm90.switched(True), emulated.capability(9, 0), running_on("cuda"):
        attention(**qkv(L=5, S=5))
        assert "no CUDA kernels for sm_90a" in cuda_sm90.why_not_here(torch.device("cpu"))
    assert launched == [OTHER]


@pytest.mark.skipif(not emulated.installed(), reason="a device's capability is not for a test to choose")
def test_it_is_on_where_nobody_switched_it_off(launched):
    with cuda_sm90.switched(cuda_sm90.ON_BY_DEFAULT), emulated.capability(9, 0), running_on("cuda"):
        attention(**qkv(L=5, S=5))
    with cuda_sm90.switched(False), emulated.capability(9, 0), running_on("cuda"):
        attention(**qkv(L=5, S=5))
        assert cuda_sm90.SWITCH in cuda_sm90.why_not_here(torch.device("cpu"))
    assert launched == [OURS, OTHER]


@pytest.mark.parametrize(("text", "expected"), [("", True), ("0", False), ("1", True), ("yes", ValueError)])
def test_the_switch_is_read_from_the_environment(text, expected, monkeypatch):
    monkeypatch.setenv(cuda_sm90.SWITCH, text)
    if expected is ValueError:
        with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
            cuda_sm90._read_switch()
    else:
        assert cuda_sm90._read_switch() is expected


# ---------------------------------------------------------------- what only a GPU can show

LONG = (
    Case("full", q=(1, 2, 2048, 128), k=(1, 1, 2048, 128)),
    Case("causal", q=(1, 2, 3000, 128), k=(1, 1, 3000, 128), causal="bottom_right"),
    Case("full_narrow", q=(1, 2, 2048, 64), k=(1, 2, 2048, 64)),
    Case("window_narrow", q=(1, 2, 2500, 64), k=(1, 2, 3100, 64), window=(700, 300), causal="bottom_right"),
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("case", LONG, ids=case_id)
def test_both_kernels_are_right_at_the_lengths_of_models(case, dtype):
    tensors = {name: normal(*case["q" if name == "q" else "k"], dtype=dtype, device="cuda") for name in "qkv"}
    options = {name: case[name] for name in ("causal", "window") if name in case}
    got = {}
    for on in (True, False):
        with cuda_sm90.switched(on):
            why = cuda_sm90.why_not_here(torch.device("cuda", torch.cuda.current_device()))
            if on and why is not None:
                pytest.skip(why)
            got[on] = assert_backend_matches(attention_with_lse, "cuda", tensors, **options)
    torch.testing.assert_close(got[True]["out1"], got[False]["out1"], atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_another_stream_and_memory_that_was_used_before():
    tensors = qkv(B=4, H=8, L=500, S=700, D=128, device="cuda")
    with cuda_sm90.switched(True), running_on("cuda"):
        why = cuda_sm90.why_not_here(torch.device("cuda", torch.cuda.current_device()))
        if why is not None:
            pytest.skip(why)
        first = attention_with_lse(**tensors, causal="bottom_right")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            runs = [attention_with_lse(**tensors, causal="bottom_right") for _ in range(20)]
        torch.cuda.synchronize()
    for run in runs:
        assert_equal(run, first)
