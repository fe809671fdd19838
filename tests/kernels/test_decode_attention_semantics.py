"""What decode_attention promises beyond closeness: unseen garbage, determinism, independence, errors."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import decode_attention, use_backend
from fused_transformer.kernels.decode_attention import op
from tests.inputs import FLOATS, Case, case_id, dtype_id, running_on, threads
from tests.kernels.decode_attention_cases import BACKENDS, assert_right, build, run
from tests.oracle import assert_equal, in_float64

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("capacity", [70, 600])
@every_backend
def test_a_query_without_keys_gives_zeros(backend, capacity, device):
    tensors, options = build(Case("any", L=3, C=capacity, lengths=(0, 2, 5)), device=device)
    out, lse = assert_right(backend, tensors, **options)
    assert (out[0] == 0).all() and (out[1, :, 0] == 0).all() and (out[1:, :, 1:] != 0).all()
    assert (lse[0] == -torch.inf).all() and (lse[1, :, 0] == -torch.inf).all() and lse[1:, :, 1:].isfinite().all()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("rows", ["own", "shared", "table"])
@every_backend
def test_what_is_not_read_never_leaks(backend, rows, dtype, garbage, device):
    """Beyond the lengths, and in rows and positions that no sequence names."""
    case = Case("any", B=3, R=3 if rows == "own" else 5, C=300, lengths=(299, 64, 0))
    clean, options = build(Case("any", **case, **({} if rows == "own" else {"rows": rows})), dtype, device)
    read = torch.zeros(len(clean["k_cache"]), 300, dtype=torch.bool, device=device)
    for b, length in enumerate(options["lengths"].tolist()):
        row = torch.tensor(b, device=device) if rows == "own" else options["rows"][b].long()  # one, or one a position
        read[row.expand(300)[:length], torch.arange(length, device=device)] = True
    dirty = {name: torch.where(read[:, None, :, None], clean[name], garbage) for name in ("k_cache", "v_cache")}
    assert_equal(run(backend, {**clean, **dirty}, **options), run(backend, clean, **options))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", [Case("plain"), Case("grouped", H=4, Hk=1, D=40)], ids=case_id)
@every_backend
def test_a_later_key_never_reaches_an_earlier_query(backend, case, garbage, device):
    """The keys of a draft: query 0 of 4 does not see the three newest, whatever they hold; the others do."""
    clean, options = build(Case("any", B=3, L=4, C=140, lengths=(140, 66, 4), **case), device=device)
    dirty = {name: x.clone() for name, x in clean.items()}
    for b, length in enumerate(options["lengths"].tolist()):
        dirty["k_cache"][b, :, length - 3 : length] = garbage
        dirty["v_cache"][b, :, length - 3 : length] = garbage
    (out, lse), (clean_out, clean_lse) = run(backend, dirty, **options), run(backend, clean, **options)
    assert_equal((out[:, :, 0], lse[:, :, 0]), (clean_out[:, :, 0], clean_lse[:, :, 0]))
    assert not out[:, :, 1:].isfinite().any()


@pytest.mark.parametrize("queries", [1, 3])
@every_backend
def test_a_bad_value_reaches_exactly_the_queries_that_see_it(backend, queries, device):
    tensors, options = build(Case("any", B=2, H=2, L=queries, C=300, lengths=(300, 300)), device=device)
    for name, position in (("v_cache", 298), ("v_cache", 20)):
        dirty = {**tensors, name: tensors[name].clone()}
        dirty[name][0, 1, position, 4] = torch.nan
        hit = run(backend, dirty, **options)[0].isnan()
        seen = [i for i in range(queries) if position < 300 - (queries - 1 - i)]
        assert hit[0, 1, seen, 4].all() and int(hit.sum()) == len(seen)
    for position in (298, 20):
        dirty = {**tensors, "k_cache": tensors["k_cache"].clone()}
        dirty["k_cache"][0, 1, position, 4] = torch.nan
        out, lse = run(backend, dirty, **options)
        seen = [i for i in range(queries) if position < 300 - (queries - 1 - i)]
        assert out[0, 1, seen].isnan().all() and int(out.isnan().sum()) == len(seen) * 16
        assert lse[0, 1, seen].isnan().all() and int(lse.isnan().sum()) == len(seen)


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("queries", [1, 3])
@every_backend
def test_the_same_bits_again_and_on_any_number_of_threads(backend, queries, device):
    case = Case("any", B=2, R=5, H=4, Hk=2, L=queries, C=700, D=24, lengths=(700, 300), rows="table")
    tensors, options = build(case, device=device)
    runs = []
    for count in (1, 2, 2, 5):
        with threads(count):
            runs.append(run(backend, tensors, **options))
    for other in runs[1:]:
        assert_equal(other, runs[0])


@pytest.mark.parametrize("queries", [1, 3])
@every_backend
def test_a_sequence_does_not_depend_on_the_rest_of_the_batch(backend, queries, device):
    tensors, options = build(Case("any", B=4, H=2, L=queries, C=600, lengths=(600, 413, 0, 70)), device=device)
    out, lse = run(backend, tensors, **options)
    for b in range(4):
        alone = run(backend, {name: x[b : b + 1] for name, x in tensors.items()}, lengths=options["lengths"][b : b + 1])
        assert_equal(alone, (out[b : b + 1], lse[b : b + 1]))


@every_backend
def test_lengths_of_the_whole_capacity_change_no_bit(backend, device):
    tensors, options = build(Case("any", C=300, lengths=None), device=device)
    lengths = torch.full((3,), 300, dtype=torch.int32, device=device)
    assert_equal(run(backend, tensors, **options), run(backend, tensors, lengths=lengths))
    assert_equal(run(backend, tensors, **options), run(backend, tensors, lengths=lengths.long()))


@every_backend
def test_results_over_two_parts_of_the_keys_merge_by_lse(backend, device):
    tensors, _ = build(Case("any", C=300), device=device)
    whole, lse = assert_right(backend, tensors)
    halves = [slice(0, 100), slice(100, 300)]
    parts = [
        run(backend, {"q": tensors["q"], **{name: tensors[name][:, :, half] for name in ("k_cache", "v_cache")}})
        for half in halves
    ]
    merged = torch.logaddexp(parts[0][1], parts[1][1])
    torch.testing.assert_close(merged, lse)
    torch.testing.assert_close(sum(torch.exp(part - merged)[..., None] * out for out, part in parts), whole)


# ---------------------------------------------------------------- errors, and what else users lean on


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 2, 16)}, r"q must have shape \(B, H, L, D\), got \(2, 2, 16\)"),
        ({"k_cache": zeros(2, 2, 16)}, r"k_cache must have shape \(R, H_k, C, D\), got \(2, 2, 16\)"),
        ({"v_cache": zeros(2, 2, 8, 16)}, "k_cache and v_cache must have the same shape"),
        ({"q": zeros(2, 3, 1, 16)}, "heads of q must be a multiple of those of the cache, got 3 and 2"),
        ({"q": zeros(2, 2, 1, 8)}, "q and k_cache must agree in head width, got 8 and 16"),
        ({"q": zeros(3, 2, 1, 16)}, "without rows the cache has one row for each sequence of q, got 2 and 3"),
        ({"q": zeros(2, 2, 1, 16).half()}, "all tensors must have the same dtype, got q: float16"),
        ({"q": zeros(2, 2, 1, 16).int()}, "q must be float32, float16, bfloat16 or float64, got int32"),
        ({"v_cache": zeros(2, 2, 16, 9).mT}, "v_cache must be contiguous along its last axis, got strides"),
        ({"q": zeros(2, 2, 1, 16).requires_grad_()}, "decode_attention has no gradient, and q requires one"),
        ({"lengths": torch.tensor([3])}, r"lengths must have shape \(2,\), got \(1,\)"),
        ({"lengths": torch.tensor([3.0, 4.0])}, "lengths must be int32 or int64, got float32"),
        ({"lengths": torch.empty(2, dtype=torch.int64, device="meta")}, "lengths must be on cpu, as q is, got meta"),
        ({"rows": torch.tensor([0, 1, 1])}, r"rows must have shape \(B,\) = \(2,\) or \(B, C\) = \(2, 9\), got \(3,\)"),
        ({"rows": torch.zeros(2, 8).int()}, r"rows must have shape .* got \(2, 8\)"),
        ({"rows": torch.tensor([True, False])}, "rows must be int32 or int64, got bool"),
        ({"k_cache": zeros(0, 2, 9, 16), "v_cache": zeros(0, 2, 9, 16), "rows": torch.tensor([0, 0])}, "has none"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_bad_arguments_are_named(change, message):
    call = {"q": zeros(2, 2, 1, 16), "k_cache": zeros(2, 2, 9, 16), "v_cache": zeros(2, 2, 9, 16)}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([3, 10])}, "lengths must be between 0 and 9, got 10"),
        ({"lengths": torch.tensor([-1, 3], dtype=torch.int32)}, "lengths must be between 0 and 9, got -1"),
        ({"rows": torch.tensor([0, 2])}, "rows must be between 0 and 1, got 2"),
        ({"rows": torch.tensor([-1, 0], dtype=torch.int32)}, "rows must be between 0 and 1, got -1"),
        ({"rows": torch.full((2, 9), 5)}, "rows must be between 0 and 1, got 5"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbers_out_of_range_are_named(backend, change, message):
    call = {"q": zeros(2, 2, 1, 16), "k_cache": zeros(2, 2, 9, 16), "v_cache": zeros(2, 2, 9, 16)}
    with running_on(backend), pytest.raises(ValueError, match=f"^{message}$"):
        decode_attention(**{**call, **change})


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_reads_nothing_outside_of_the_cache(backend, device):
    """There nobody looks at the numbers beforehand: those out of range count as the nearest in it."""
    tensors, options = build(Case("any", B=3, R=5, H=2, L=2, C=70, lengths=(70, 0, 70), rows="table"), device=device)
    options["rows"][0, 3], options["rows"][2, 69] = 0, 4
    expected = run(backend, tensors, **options)
    options["lengths"] = torch.tensor([71, -3, 2**40], device=device)
    options["rows"] = options["rows"].long()
    options["rows"][0, 3], options["rows"][2, 69] = -(2**40), 5
    assert_equal(run(backend, tensors, **options), expected)
    shared = [torch.tensor(rows, device=device) for rows in ([0, 4, 4], [-1, 5, 2**40])]
    lengths = torch.tensor([70, 0, 7], device=device)
    one, other = (run(backend, tensors, lengths=lengths, rows=rows) for rows in shared)
    assert_equal(one, other)


def test_something_else_than_a_tensor_is_a_type_error():
    x = zeros(1, 1, 1, 4)
    with pytest.raises(TypeError, match=r"lengths must be a torch\.Tensor, got list"):
        decode_attention(x, x, x, [1])
    with pytest.raises(TypeError, match=r"k_cache must be a torch\.Tensor, got tuple"):
        decode_attention(x, (x,), x)


@every_backend
def test_a_head_that_is_too_wide_is_refused_in_words(backend):
    x = zeros(1, 1, 1, 257)
    if op.why_not(backend, x, x, x, None, None, True, 1.0, False) in (None, "not written yet"):
        pytest.skip(f"decode_attention, {backend}: not there")
    with use_backend(backend), pytest.raises(NotImplementedError, match=r"head width must be 1 \.\.\. 256, got 257"):
        decode_attention(x, x, x)


def test_float64_goes_to_the_reference():
    tensors, options = build(Case("any", rows="table"))
    tensors = in_float64(tensors)
    out = decode_attention(**tensors, **options)
    assert out.dtype == torch.float64
    with use_backend("reference"):
        assert_equal(out, decode_attention(**tensors, **options))


def test_gradients_are_refused_only_where_they_are_asked_for():
    x = zeros(1, 1, 1, 4).requires_grad_()
    with torch.no_grad():
        decode_attention(x, x, x)
    with torch.inference_mode():
        decode_attention(x, x, x)
    with pytest.raises(ValueError, match="no gradient"):
        decode_attention(x.detach(), x, x)


@every_backend
def test_compiled_equals_eager(backend):
    tensors, options = build(Case("any"))
    compiled = torch.compile(lambda q, k, v: decode_attention(q, k, v, **options) * 2.0, backend="eager")
    with torch.no_grad(), running_on(backend):
        assert_equal(compiled(*tensors.values()), decode_attention(**tensors, **options) * 2.0)
