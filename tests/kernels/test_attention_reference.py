"""The first link of the chain of trust: torch.nn.functional in float64 <- attention's reference backend.

Masks are spelled out here element by element in Python loops, so that they share no code with the reference.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_transformer.kernels import _philox, attention, attention_weights, attention_with_lse, use_backend
from tests.inputs import Case, case_id
from tests.oracle import run_with_gradients

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


# ---------------------------------------------------------------- attention


def visible(batch, heads, length, keys, causal=False, window=(-1, -1), lengths=None, keep=None) -> Tensor:
    """(B, H, L, S) bool, one element at a time from the sentences in `attention`'s docstring."""
    out = torch.zeros(batch, heads, length, keys, dtype=torch.bool)
    keep = None if keep is None else keep.expand(batch, heads, length, keys)
    for b in range(batch):
        n = keys if lengths is None else lengths[b]
        for h in range(heads):
            for query in range(length):
                i = query + n - length if causal == "bottom_right" else query
                for j in range(n):
                    seen = not causal or j <= i
                    seen &= window[0] < 0 or j >= i - window[0]
                    seen &= window[1] < 0 or j <= i + window[1]
                    out[b, h, query, j] = seen and (keep is None or bool(keep[b, h, query, j]))
    return out


ATTENTION_CASES = (
    Case("unmasked"),
    Case("one_query", length=1),
    Case("one_key", keys=1),
    Case("one_of_all", batch=1, heads=1, heads_k=1, length=1, keys=1, width=1),
    Case("grouped_queries", heads=6, heads_k=2),
    Case("one_key_head", heads=4, heads_k=1, causal="top_left"),
    Case("keep", keep=(2, 4, 5, 7)),
    Case("keep_over_keys", keep=(2, 1, 1, 7)),
    Case("keep_over_queries_and_keys", keep=(5, 7)),
    Case("keep_per_head", keep=(4, 1, 1)),
    Case("lengths", lengths=(7, 3)),
    Case("a_length_of_zero", lengths=(0, 4)),
    Case("top_left_with_more_keys", causal="top_left"),
    Case("top_left_with_more_queries", causal="top_left", length=8, keys=3),
    Case("bottom_right_with_more_keys", causal="bottom_right"),
    Case("bottom_right_with_more_queries", causal="bottom_right", length=8, keys=3),
    Case("bottom_right_and_lengths", causal="bottom_right", lengths=(7, 2)),
    Case("window", window=(2, 1)),
    Case("window_left_only", window=(1, -1), length=7),
    Case("window_right_only", window=(-1, 2)),
    Case("window_bottom_right", window=(2, 0), causal="bottom_right", lengths=(6, 4)),
    Case("everything", causal="bottom_right", window=(3, 0), lengths=(7, 5), keep=(2, 1, 5, 7), bias=(1, 4, 5, 7)),
    Case("bias", bias=(2, 4, 5, 7)),
    Case("bias_per_head", bias=(4, 5, 7)),
    Case("bias_over_keys", bias=(7,)),
    Case("bias_and_grouped_queries", heads=6, heads_k=3, bias=(6, 1, 7), causal="top_left"),
    Case("bias_that_masks", bias=(2, 4, 5, 7), minus_infinity=True),
    Case("scale", scale=0.7),
    Case("no_batch", batch=0),
    Case("no_queries", length=0),
    Case("no_keys", keys=0),
)


def make_attention(case: Case, dtype: torch.dtype = DOUBLE) -> tuple[dict, dict, Tensor]:
    """The tensors, the other arguments, and what may be seen."""
    batch, heads, heads_k, width = (case.get(*x) for x in (("batch", 2), ("heads", 4), ("heads_k", None), ("width", 6)))
    length, keys = case.get("length", 5), case.get("keys", 7)
    tensors = {
        "q": torch.randn(batch, heads, length, width, dtype=dtype),
        "k": torch.randn(batch, heads_k or heads, keys, width, dtype=dtype),
        "v": torch.randn(batch, heads_k or heads, keys, width, dtype=dtype),
    }
    options = {name: case[name] for name in ("causal", "window", "scale") if name in case}
    keep = None
    if "keep" in case:
        options["keep"] = keep = torch.rand(case["keep"]) > 0.3
    if "lengths" in case:
        options["k_lengths"] = torch.tensor(case["lengths"])
    mask = visible(
        batch, heads, length, keys, case.get("causal"), case.get("window", (-1, -1)), case.get("lengths"), keep
    )
    if "bias" in case:
        tensors["bias"] = torch.randn(case["bias"], dtype=dtype)
        if "minus_infinity" in case:
            tensors["bias"].masked_fill_(torch.rand(case["bias"]) > 0.6, -torch.inf)
            mask &= tensors["bias"] > -torch.inf
    return tensors, options, mask


def plain_scores(q, k, bias=None, *, mask, scale=None):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * (q @ k.transpose(-1, -2))
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~mask, -torch.inf)


def functional_attention(q, k, v, bias=None, *, mask, scale=None):
    """F.scaled_dot_product_attention with every mask as one; rows that see nothing are cut out of its graph."""
    alive = mask.any(-1, keepdim=True)
    added = torch.zeros(mask.shape, dtype=q.dtype) if bias is None else bias.expand(mask.shape)
    added = torch.where(mask, added, torch.where(alive, -torch.inf, 0.0).to(q.dtype))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=grouped)
    return torch.where(alive, out, 0)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=case_id)
def test_attention_is_torch_s_attention(case):
    tensors, options, mask = make_attention(case)
    got = run_with_gradients(attention, tensors, **options)
    expected = run_with_gradients(functional_attention, tensors, mask=mask, scale=case.get("scale"))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("length", "keys"), [(6, 6), (4, 7), (7, 4)])
def test_top_left_is_torch_s_is_causal(length, keys):
    q, k, v = torch.randn(2, 3, length, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    got = attention(q.double(), k.double(), v.double(), causal="top_left")
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# no finite differences of a bias of -inf, nor of an empty tensor
SMOOTH_CASES = tuple(c for c in ATTENTION_CASES if "minus_infinity" not in c and not c.name.startswith("no_"))


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=case_id)
def test_attention_s_gradients_are_those_of_its_output(case):
    tensors, options, _ = make_attention(case)
    leaves = [x.requires_grad_() for x in tensors.values()]

    def function(*inputs):
        return attention(**dict(zip(tensors, inputs, strict=True)), **options)

    assert torch.autograd.gradcheck(function, leaves, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=case_id)
def test_lse_is_the_logarithm_of_the_denominator(case):
    tensors, options, mask = make_attention(case)
    _, lse = attention_with_lse(**tensors, **options)
    scores = plain_scores(tensors["q"], tensors["k"], tensors.get("bias"), mask=mask, scale=case.get("scale"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(lse == -torch.inf, ~mask.any(-1))
    assert attention_with_lse(*(tensors[x].half() for x in "qkv"), **options)[1].dtype == torch.float32


def weights_of(q, k, bias=None, **options):
    _, lse = attention_with_lse(q, k, k, bias=bias, **options)
    return attention_weights(q, k, lse, bias=bias, **options)


def softmax_of(q, k, bias=None, *, mask, scale=None):
    alive = mask.any(-1, keepdim=True)
    scores = plain_scores(q, k, bias, mask=mask, scale=scale).masked_fill(~alive, 0)
    return torch.where(mask, scores.softmax(-1), 0)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=case_id)
def test_weights_are_the_softmax_and_differentiable(case):
    tensors, options, mask = make_attention(case)
    del tensors["v"]
    got = run_with_gradients(weights_of, tensors, **options)
    expected = run_with_gradients(softmax_of, tensors, mask=mask, scale=case.get("scale"))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


DROPOUT_CASES = tuple(case for case in ATTENTION_CASES if case.name in ("unmasked", "everything", "grouped_queries"))


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=case_id)
def test_attention_drops_the_weights_that_philox_says(case):
    tensors, options, mask = make_attention(case)
    batch, heads, length, keys = mask.shape
    options |= {"dropout_p": 0.4, "seed": torch.tensor([-(2**40) + 17])}
    keep = torch.stack(
        [
            _philox.keep_mask(options["seed"], 0.4, torch.tensor(o), torch.arange(length)[:, None], torch.arange(keys))
            for o in range(batch * heads)
        ]
    ).view(mask.shape)

    def plain(q, k, v, bias=None):
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return (softmax_of(q, k, bias, mask=mask) * keep / 0.6) @ v

    got = run_with_gradients(attention, tensors, **options)
    torch.testing.assert_close(got, run_with_gradients(plain, tensors), rtol=1e-10, atol=1e-12)

    lse = attention_with_lse(**tensors, **options)[1]
    weights = attention_weights(tensors["q"], tensors["k"], lse, bias=tensors.get("bias"), **options)
    expected = softmax_of(tensors["q"], tensors["k"], tensors.get("bias"), mask=mask) * keep / 0.6
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)


def test_everything_dropped_is_zero():
    tensors, _, _ = make_attention(Case("unmasked"))
    results = run_with_gradients(attention, tensors, dropout_p=1.0, seed=torch.tensor([3]))
    assert all(bool((x == 0).all()) for x in results.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if c.name in ("lengths", "keep_over_keys")], ids=case_id)
def test_what_is_masked_may_hold_anything(case, bad):
    tensors, options, mask = make_attention(case)
    unseen = ~mask.any(2)[..., None]  # (B, H, S, 1): keys that no query sees
    assert bool(unseen.any())
    expected = run_with_gradients(attention, tensors, **options)
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(unseen, bad)
    torch.testing.assert_close(run_with_gradients(attention, tensors, **options), expected, rtol=0, atol=0)
    assert weights_of(tensors["q"], tensors["k"], **options).isfinite().all()


def test_a_bad_value_reaches_the_queries_that_see_it_and_no_other():
    tensors, options, mask = make_attention(Case("causal", causal="top_left"))
    tensors["v"][:, :, 3] = torch.nan
    out = attention(**tensors, **options)
    assert torch.equal(out.isnan(), mask[..., 3:4].expand_as(out))


def test_a_row_that_sees_nothing_gives_zeros():
    tensors, options, _ = make_attention(Case("keep", keep=(2, 4, 5, 7), bias=(2, 4, 5, 7)))
    options["keep"][:, 1, 2] = options["keep"][1, :, 0] = False
    dead = ~options["keep"].any(-1)
    tensors["q"][dead] = torch.nan  # not even this
    got = run_with_gradients(attention, tensors, **options)
    assert bool((got["out"][dead] == 0).all() and (got["dq"][dead] == 0).all() and (got["dbias"][dead] == 0).all())
    assert all(bool(x.isfinite().all()) for x in got.values())
    lse = attention_with_lse(**tensors, **options)[1]
    assert torch.equal(lse == -torch.inf, dead)
    weights = attention_weights(tensors["q"], tensors["k"], lse, bias=tensors["bias"], keep=options["keep"])
    assert bool((weights[dead] == 0).all())


@pytest.mark.parametrize("logit", [-120.0, 1e4, -1e4])
def test_large_logits_do_not_overflow(logit):
    tensors, _, mask = make_attention(Case("unmasked"))
    tensors["bias"] = torch.full((1,), logit, dtype=DOUBLE)
    got = run_with_gradients(attention, tensors)
    del tensors["bias"]
    expected = run_with_gradients(functional_attention, tensors, mask=mask)
    for name, x in expected.items():  # adding one number to every score changes nothing
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-9)


PACKED_CASES = (
    Case("unmasked"),
    Case("causal", causal="top_left"),
    Case("bottom_right", causal="bottom_right"),
    Case("window", causal="bottom_right", window=(2, 0)),
    Case("lengths", k_lengths=(3, 0, 2, 1)),
    Case("keep", keep=(4, 1, 6, 8)),
    Case("bias", bias=(3, 6, 8)),
    Case("cross", k_lengths=(3, 0, 8, 1), bias=(4, 3, 6, 8), cross=True),
)


@pytest.mark.parametrize("case", PACKED_CASES, ids=case_id)
def test_a_packed_batch_is_its_sequences_one_by_one(case):
    q_sizes = [4, 1, 6, 0]
    k_sizes = [3, 2, 8, 1] if "cross" in case else q_sizes
    q_offsets, k_offsets = (torch.tensor([0, *sizes]).cumsum(0) for sizes in (q_sizes, k_sizes))
    extra = 2  # tokens beyond the last sequence: zeros come out, and no gradient
    tensors = {
        "q": torch.randn(sum(q_sizes) + extra, 3, 5, dtype=DOUBLE),
        "k": torch.randn(sum(k_sizes) + extra, 3, 5, dtype=DOUBLE),
        "v": torch.randn(sum(k_sizes) + extra, 3, 5, dtype=DOUBLE),
    }
    options = {name: case[name] for name in ("causal", "window") if name in case}
    lengths = torch.tensor([min(n, size) for n, size in zip(case.get("k_lengths", k_sizes), k_sizes, strict=True)])
    keep = torch.rand(case["keep"]) > 0.4 if "keep" in case else None
    if "bias" in case:
        tensors["bias"] = torch.randn(case["bias"], dtype=DOUBLE)

    def one_by_one(q, k, v, bias=None):
        out = torch.zeros_like(q)
        for b, (rows, n) in enumerate(zip(q_sizes, lengths.tolist(), strict=True)):
            i, j = int(q_offsets[b]), int(k_offsets[b])
            mask = {}
            if keep is not None:
                mask["keep"] = keep[b : b + 1, :, :rows, :n]
            if bias is not None:
                bias_b = bias[b : b + 1] if bias.dim() == 4 else bias[None]
                mask["bias"] = bias_b[..., :rows, :n]
            q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in (q[i : i + rows], k[j : j + n], v[j : j + n]))
            out[i : i + rows] = attention(q_b, k_b, v_b, **mask, **options)[0].transpose(0, 1)
        return out

    offsets = {"q_offsets": q_offsets} | ({"k_offsets": k_offsets.int()} if "cross" in case else {})
    lengths_given = {"k_lengths": lengths} if "k_lengths" in case else {}
    got = run_with_gradients(attention, tensors, keep=keep, **offsets, **lengths_given, **options)
    torch.testing.assert_close(got, run_with_gradients(one_by_one, tensors), rtol=1e-10, atol=1e-12)
    assert bool((attention_with_lse(**tensors, keep=keep, **offsets, **options)[1][-extra:] == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_the_same_formula(dtype):
    everything = next(case for case in ATTENTION_CASES if case.name == "everything")
    tensors, options, mask = make_attention(everything, dtype)
    got = run_with_gradients(attention, tensors, **options)
    expected = run_with_gradients(functional_attention, {n: x.double() for n, x in tensors.items()}, mask=mask)
    for name, x in got.items():
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), expected[name], rtol=0, atol=30 * torch.finfo(dtype).eps)
