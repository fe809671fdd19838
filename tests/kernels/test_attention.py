"""Every attention backend against the reference in float64: shapes, dtypes, masks, layouts, gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fused_transformer.kernels import attention, attention_weights, attention_with_lse, use_backend
from fused_transformer.kernels.attention import op
from tests.inputs import FLOATS, LAYOUTS, Case, case_id, dtype_id, normal, running_on
from tests.oracle import assert_backend_matches, assert_matches, in_float64

BACKENDS = [name for name in op.order if name != "reference"]

# Sizes default to B 2, H 2, Hk H, L 33, S L, D 16; masks are described in `options`.
SHAPES = (
    Case("one", B=1, H=1, L=1, S=1, D=1),
    Case("prime", B=3, H=1, L=37, S=101, D=13),
    Case("one_query", L=1, S=70),
    Case("one_key", L=50, S=1),
    Case("below_a_block", L=15, S=63),
    Case("a_block", L=48, S=64),
    Case("above_a_block", L=49, S=65),
    Case("64_mod_128", L=192, S=192, H=1),
    Case("63_mod_128", L=191, S=191, H=1),
    Case("65_mod_128", L=193, S=193, H=1),
    Case("several_chunks", B=1, H=1, L=400, S=150),
    Case("base_width", L=64, S=64, D=64),
    Case("odd_width", L=20, S=40, D=33),
    Case("width_96", L=20, S=40, D=96),
    Case("widest", L=20, S=70, D=256, H=1),
    Case("grouped_queries", H=6, Hk=2, L=40, S=40),
    Case("one_key_head", H=4, Hk=1, L=20, S=20),
    Case("empty_batch", B=0),
    Case("no_queries", L=0, S=5),
    Case("no_keys", L=5, S=0),
)

MASKS = (
    Case("causal_square", causal="top_left"),
    Case("top_left_longer_keys", L=20, S=90, causal="top_left"),
    Case("top_left_longer_queries", L=90, S=20, causal="top_left"),
    Case("bottom_right_longer_keys", L=20, S=90, causal="bottom_right"),
    Case("bottom_right_longer_queries", L=90, S=20, causal="bottom_right"),
    Case("lengths", B=4, L=70, S=70, k_lengths=(70, 0, 64, 3)),
    Case("lengths_bottom_right", B=3, L=9, S=70, k_lengths=(70, 5, 9), causal="bottom_right"),
    Case("window", B=1, L=100, S=100, window=(5, 3)),
    Case("window_left_only", B=1, L=150, S=150, window=(70, -1)),
    Case("window_causal", B=1, L=100, S=130, window=(7, -1), causal="bottom_right"),
    Case("window_of_one", L=70, S=70, window=(0, 0)),
    Case("keep_over_keys", B=3, L=40, S=100, keep=(3, 1, 1, 100), kept=0.6),
    Case("keep_right_padding", B=3, L=40, S=100, keep="padding"),
    Case("keep_square", L=65, S=65, keep=(65, 65), kept=0.5),
    Case("keep_sparse", B=2, L=50, S=140, keep=(2, 2, 50, 140), kept=0.02),
    Case("keep_dense", L=50, S=140, keep=(1, 2, 50, 140), kept=0.98),
    Case("keep_rows", L=50, S=70, keep=(2, 1, 50, 1), kept=0.5),
    Case("keep_nothing", L=20, S=70, keep=(1, 1, 20, 70), kept=0.0),
    Case("bias", L=50, S=70, bias=(2, 2, 50, 70)),
    Case("bias_per_head", B=3, L=50, S=70, bias=(1, 2, 50, 70)),
    Case("bias_square", B=3, L=50, S=50, bias=(50, 50)),
    Case("bias_over_keys", L=50, S=70, bias=(2, 1, 1, 70)),
    Case("bias_with_minus_infinity", L=50, S=70, bias=(2, 2, 50, 70), minus_infinity=0.3),
    Case("all_at_once", B=3, H=4, Hk=2, L=60, S=75, causal="bottom_right", window=(40, 5), k_lengths=(75, 60, 2),
         keep=(3, 1, 60, 75), kept=0.8, bias=(1, 4, 60, 75)),
)  # fmt: skip


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor | None], dict]:
    """The tensors with gradients, and the other options, of a case."""
    sizes = {"B": 2, "H": 2, "L": 33, "D": 16, **{key: case[key] for key in case if key in "BHHkLSD"}}
    B, H, L, D = (sizes[name] for name in "BHLD")
    Hk, S = sizes.get("Hk", H), sizes.get("S", L)
    tensors = {
        "q": normal(B, H, L, D, dtype=dtype, device=device),
        "k": normal(B, Hk, S, D, dtype=dtype, device=device),
        "v": normal(B, Hk, S, D, dtype=dtype, device=device),
    }
    options = {name: case[name] for name in ("causal", "window") if name in case}
    if "k_lengths" in case:
        options["k_lengths"] = torch.tensor(case["k_lengths"], device=device)
    if case.get("keep") == "padding":
        lengths = torch.tensor([S, S // 3, S - 1], device=device)
        options["keep"] = (torch.arange(S, device=device) < lengths[:, None])[:, None, None, :]
    elif "keep" in case:
        options["keep"] = torch.rand(case["keep"], device=device) < case["kept"]
    if "bias" in case:
        bias = normal(*case["bias"], dtype=dtype, device=device)
        masked = torch.rand(case["bias"], device=device) < case.get("minus_infinity", 0.0)
        tensors["bias"] = torch.where(masked, -torch.inf, bias)
    return tensors, options


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", [*SHAPES, *MASKS], ids=case_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_reference(backend, case, dtype, device):
    tensors, options = build(case, dtype, device)
    assert_backend_matches(attention_with_lse, backend, tensors, **options)


@pytest.mark.parametrize("case", [*SHAPES, *MASKS], ids=case_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_match_the_reference(backend, case, device):
    tensors, options = build(case, torch.float32, device)
    inputs = {name: x for name, x in tensors.items() if name != "v"}

    def weights(q, k, bias=None):
        _, lse = attention_with_lse(q, k, k, bias=bias, **options)
        return attention_weights(q, k, lse, bias=bias, **options)

    assert_backend_matches(weights, backend, inputs)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, layout, device):
    tensors, options = build(Case("any", L=40, S=70, D=16, causal="bottom_right"), torch.float32, device)
    tensors = {name: LAYOUTS[layout](x) for name, x in tensors.items()}
    assert_backend_matches(attention_with_lse, backend, tensors, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_projected_side_by_side(backend, device):
    """The layout a model makes: (B, L, 3, H, D) from one projection; out comes back in (B, L, H, D) order."""
    qkv = normal(2, 30, 3, 4, 16, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    got = assert_backend_matches(attention, backend, {"q": q, "k": k, "v": v}, causal="top_left")
    assert got["out"].transpose(1, 2).is_contiguous()


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["dense", "strided", "transposed"])
@pytest.mark.parametrize("kind", ["keep", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_any_strides(backend, kind, layout, device):
    tensors, options = build(Case("any", L=40, S=70, keep=(2, 2, 40, 70), kept=0.7, bias=(2, 2, 40, 70)), torch.float32)
    if kind == "keep":
        del tensors["bias"]
        wide = torch.ones(2, 2, 40, 75, dtype=torch.bool)
        wide[..., 2:-3] = options["keep"]
        keep = {"dense": options["keep"], "strided": wide[..., 2:-3]}.get(layout)
        options["keep"] = keep if keep is not None else options["keep"].transpose(2, 3).contiguous().transpose(2, 3)
    else:
        del options["keep"]
        tensors["bias"] = LAYOUTS[layout](tensors["bias"])
    tensors = {name: x.to(device) for name, x in tensors.items()}
    options = {name: x.to(device) for name, x in options.items()}
    assert_backend_matches(attention_with_lse, backend, tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("scale", [1.0, 0.03, -0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, scale, dtype, device):
    tensors, _ = build(Case("any"), dtype, device)
    # 3: torch's product, which is the naive one's, has about half the error of others on some processors.
    judge = partial(assert_matches, factor=3.0)
    assert_backend_matches(attention_with_lse, backend, tensors, judge=judge, scale=scale)


@pytest.mark.parametrize("shift", [-120.0, 1e4, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend, shift, device):
    """Logits near -120 (where exp of a plain score is 0) and ±1e4; lengths 64 mod 128, where a peer gave NaN."""
    tensors, _ = build(Case("any", L=192, S=192, D=64, H=1), torch.float32, device)
    tensors["bias"] = torch.full((1, 1, 192, 192), shift, device=device)
    got = assert_backend_matches(attention_with_lse, backend, tensors)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_bias_with_float32_tensors(backend, device):
    tensors, _ = build(Case("any", bias=(2, 2, 33, 33)), torch.float32, device)
    bias = tensors.pop("bias").to(torch.bfloat16)
    with running_on(backend):
        got = attention(**tensors, bias=bias)
    with use_backend("reference"):
        exact = attention(**in_float64(tensors), bias=bias.double())
        naive = attention(**tensors, bias=bias)
    assert_matches(got, exact, naive)
