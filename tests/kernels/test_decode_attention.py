"""Every backend of decode_attention against the reference in float64, and against `attention` on the same keys."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import attention_with_lse, decode_attention, decode_attention_with_lse, use_backend
from tests.inputs import (
    FLOATS,
    LAYOUTS,
    Case,
    as_offset,
    as_strided,
    case_id,
    dtype_id,
    normal,
    running_on,
)
from tests.kernels.decode_attention_cases import BACKENDS, SHAPES, assert_right, build, gathered, run
from tests.oracle import assert_equal, assert_matches, in_float64

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", SHAPES, ids=case_id)
@every_backend
def test_matches_the_reference(backend, case, dtype, device):
    tensors, options = build(case, dtype, device)
    assert_right(backend, tensors, **options)


@pytest.mark.every_isa
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 17, 31, 32, 40, 63, 65, 80, 100, 127, 128, 129, 160, 192, 255])
@every_backend
def test_any_width(backend, width, device):
    tensors, options = build(Case("width", B=2, H=2, Hk=1, C=20, D=width), device=device)
    assert_right(backend, tensors, **options)
    tensors, options = build(Case("width", B=2, H=1, C=20, D=width), torch.bfloat16, device)
    assert_right(backend, tensors, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@every_backend
def test_agrees_with_attention(backend, causal, dtype, device):
    """`attention` over the same keys, by its own reference: what a decoding step had to call so far."""
    tensors, options = build(Case("any", B=4, H=4, Hk=2, L=3, lengths=(70, 64, 2, 0), causal=causal), dtype, device)
    got = run(backend, tensors, **options)

    def full(q, k_cache, v_cache):
        mask = {"k_lengths": options["lengths"], "causal": "bottom_right" if causal else False}
        return attention_with_lse(q, k_cache, v_cache, **mask)

    with use_backend("reference"):
        assert_matches(got, full(**in_float64(tensors)), full(**tensors))


@pytest.mark.every_isa
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("case", [case for case in SHAPES if "rows" in case], ids=case_id)
@every_backend
def test_rows_read_what_a_gathered_cache_holds(backend, case, integers, device):
    """Bit for bit; and what lies beyond the lengths, in tables too, is never looked at."""
    tensors, options = build(case, torch.float32, device)
    rows, lengths = options.pop("rows").to(integers), options["lengths"]
    own = {"q": tensors["q"]} | {name: gathered(tensors[name], rows, lengths) for name in ("k_cache", "v_cache")}
    if rows.dim() == 2 and lengths is not None:
        beyond = torch.arange(rows.shape[1], device=device) >= lengths[:, None]
        rows = rows.masked_fill(beyond, torch.iinfo(integers).max)
    assert_equal(run(backend, tensors, rows=rows, **options), run(backend, own, **options))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@every_backend
def test_beams_reordered_by_their_table_alone(backend, dtype, device):
    """Ten steps of beam search: each hypothesis goes on from a random one, and only the table moves."""
    beams, steps, heads, width = 4, 10, 2, 16
    cache = torch.full((2, beams, heads, steps, width), torch.nan, dtype=dtype, device=device)
    moved = cache.clone()  # the cache that is moved with every choice
    table = torch.full((beams, steps), 2**31 - 1, dtype=torch.int32, device=device)
    for t in range(steps):
        parents = torch.randint(0, beams, (beams,), device=device)
        table, moved = table[parents], moved[:, parents]
        new = normal(2, beams, heads, width, dtype=dtype, device=device)
        cache[:, :, :, t] = moved[:, :, :, t] = new
        table[:, t] = torch.arange(beams)
        lengths, q = torch.full((beams,), t + 1, device=device), normal(beams, heads, 1, width, dtype=dtype)
        tensors = {"q": q.to(device), "k_cache": cache[0], "v_cache": cache[1]}
        got = run(backend, tensors, lengths=lengths, rows=table)
        assert_equal(got, run(backend, tensors | {"k_cache": moved[0], "v_cache": moved[1]}, lengths=lengths))
        assert got[0].isfinite().all()


@every_backend
def test_beams_of_a_source_read_one_row(backend, device):
    """Beams as queries side by side, and beams that share a row: the same attention, read once or once each."""
    sentences, beams = 3, 4
    tensors, options = build(Case("any", B=sentences, H=2, L=beams, causal=False, lengths=(70, 33, 1)), device=device)
    side_by_side, lse = assert_right(backend, tensors, **options)
    q = tensors["q"].transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (sentences · beams, H, 1, D)
    rows = torch.arange(sentences, device=device).repeat_interleave(beams)
    lengths = options["lengths"].repeat_interleave(beams)
    alone, lse_alone = assert_right(backend, {**tensors, "q": q}, lengths=lengths, rows=rows, causal=False)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(alone.view(sentences, beams, 2, 16).transpose(1, 2), side_by_side, **close)
    torch.testing.assert_close(lse_alone.view(sentences, beams, 2).transpose(1, 2), lse, **close)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend
def test_queries_of_any_strides(backend, layout, device):
    tensors, options = build(Case("any", L=3, C=90), device=device)
    tensors["q"] = LAYOUTS[layout](tensors["q"])
    assert_right(backend, tensors, **options)


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", ["strided", "offset", "positions_first", "expanded", "both_in_one", "slice"])
@pytest.mark.parametrize("rows", [None, "table"], ids=["own_rows", "table"])
@every_backend
def test_caches_of_any_strides(backend, rows, layout, device):
    case = Case("any", C=90, **({} if rows is None else {"rows": rows}))
    tensors, options = build(case, device=device)
    k, v = tensors["k_cache"], tensors["v_cache"]
    if layout == "positions_first":  # (C, R, H, D): a step writes one run of memory
        k, v = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (k, v))
    elif layout == "both_in_one":  # (R, C, 2, H, D): as one projection writes keys and values
        k, v = torch.stack([k.transpose(1, 2), v.transpose(1, 2)], dim=2).transpose(1, 3).unbind(2)
    elif layout == "slice":  # the positions so far of a cache with room for more; keys and values strided otherwise
        wide = torch.full((*k.shape[:2], 128, k.shape[3]), torch.nan, device=device)
        wide[:, :, :90] = k
        k = wide[:, :, :90]
    elif layout == "expanded":
        k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    else:
        k, v = (as_strided(x) if layout == "strided" else as_offset(x) for x in (k, v))
    assert_right(backend, {**tensors, "k_cache": k, "v_cache": v}, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("scale", [1.0, 0.03, -0.5])
@every_backend
def test_scale(backend, scale, dtype, device):
    tensors, options = build(Case("any", C=300), dtype, device)
    assert_right(backend, tensors, scale=scale, **options)


@pytest.mark.parametrize("size", [30.0, 1e3])
@every_backend
def test_large_logits(backend, size, device):
    """Scores of ±120 and ±1e4, where exp of a plain score is 0 or infinite; more than one split of keys."""
    tensors, options = build(Case("any", B=2, H=2, L=2, C=600, D=64, lengths=(600, 555)), device=device)
    tensors["q"] *= size
    out, lse = assert_right(backend, tensors, **options)
    assert out.isfinite().all() and lse.isfinite().all()


@every_backend
def test_a_long_cache(backend, device):
    tensors, options = build(Case("any", B=1, H=4, Hk=1, C=5000, D=64, lengths=(4999,)), device=device)
    tensors["v_cache"] += 10  # sums that don't cancel
    assert_right(backend, tensors, **options)


@every_backend
def test_out_without_lse_is_the_same(backend, device):
    tensors, options = build(Case("any", L=2, C=300), device=device)
    with running_on(backend):
        assert_equal(decode_attention(**tensors, **options), decode_attention_with_lse(**tensors, **options)[0])


@every_backend
def test_out_lies_in_memory_as_q_does(backend, device):
    """(B, L, H, D), as a projection makes queries: heads side by side again without a copy."""
    tensors, options = build(Case("any", H=4, L=2), device=device)
    tensors["q"] = tensors["q"].transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = assert_right(backend, tensors, **options)
    assert out.transpose(1, 2).is_contiguous()
