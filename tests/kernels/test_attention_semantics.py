"""What attention promises beyond closeness: masked garbage, dropout, packing, determinism, errors."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import _philox, attention, attention_weights, attention_with_lse, use_backend
from fused_transformer.kernels.attention import op
from tests.inputs import FLOATS, dtype_id, normal, running_on, threads
from tests.oracle import assert_backend_matches, assert_equal, assert_matches, in_float64, run_with_gradients

BACKENDS = [name for name in op.order if name != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def qkv(B=2, H=2, L=70, S=70, D=16, dtype=torch.float32, device="cpu"):
    return {
        "q": normal(B, H, L, D, dtype=dtype, device=device),
        "k": normal(B, H, S, D, dtype=dtype, device=device),
        "v": normal(B, H, S, D, dtype=dtype, device=device),
    }


# ---------------------------------------------------------------- masked rows and masked garbage


@every_backend
def test_a_fully_masked_row_gives_zeros(backend, device):
    tensors = qkv(device=device)
    keep = torch.ones(70, 70, dtype=torch.bool, device=device)
    keep[3] = keep[64] = False
    got = assert_backend_matches(attention_with_lse, backend, tensors, keep=keep)
    assert (got["out"][:, :, [3, 64]] == 0).all() and (got["dq"][:, :, [3, 64]] == 0).all()
    assert (got["out1"][:, :, [3, 64]] == -torch.inf).all()


def assert_same(got, expected, backend: str, device: str) -> None:
    """Bit for bit. In Triton on a GPU nearly: its compiler chooses for each kernel and loop in which order the lanes of
    a float32 row are summed."""
    if backend == "triton" and device == "cuda":
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    else:
        assert_equal(got, expected)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["k_lengths", "keep", "keep_some_rows", "bias", "causal"])
@every_backend
def test_what_masked_keys_and_values_hold_never_leaks(backend, how, garbage, device):
    clean, dirty = qkv(device=device), None
    seen = torch.ones(70, 70, dtype=torch.bool, device=device)
    seen[:, [5, 66, 69]] = False
    options: dict = {}
    if how == "k_lengths":
        options["k_lengths"] = torch.tensor([50, 64], device=device)
        masked = torch.arange(70, device=device) >= options["k_lengths"][:, None, None]  # (B, 1, S)
    elif how == "causal":
        clean["q"] = clean["q"][:, :, :40]
        options["causal"] = "top_left"
        masked = (torch.arange(70, device=device) >= 40).expand(2, 1, 70)
    else:
        if how == "keep_some_rows":  # different keys for different queries, but these for none
            seen &= torch.rand(70, 70, device=device) < 0.7
        masked = ~seen.any(0).expand(2, 1, 70)
        options = {"bias": torch.where(seen, 0.5, -torch.inf)} if how == "bias" else {"keep": seen}
    masked = masked.expand(2, 2, 70)[..., None]
    dirty = {**clean, **{name: torch.where(masked, garbage, clean[name]) for name in "kv"}}
    with running_on(backend):
        got = run_with_gradients(attention_with_lse, dirty, **options)
        expected = run_with_gradients(attention_with_lse, clean, **options)
    assert_same(got, expected, backend, device)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@every_backend
def test_what_a_dead_query_holds_never_reaches_dk_and_dv(backend, garbage, device):
    tensors = qkv(device=device)
    keep = torch.ones(70, 70, dtype=torch.bool, device=device)
    keep[7] = False
    expected = assert_backend_matches(attention, backend, tensors, keep=keep)
    q = tensors["q"].clone()
    q[:, :, 7] = garbage
    with running_on(backend):
        got = run_with_gradients(attention, {**tensors, "q": q}, keep=keep)
    assert_equal(got, expected)


@every_backend
def test_a_bad_value_reaches_exactly_the_queries_that_see_it(backend, device):
    tensors = qkv(device=device)
    tensors["v"][0, 1, 30, 4] = torch.nan
    with running_on(backend):
        out = attention(**tensors, causal="top_left")
    hit = out.isnan()
    assert hit[0, 1, 30:, 4].all() and int(hit.sum()) == 40


@every_backend
def test_packed_tokens_beyond_the_last_sequence_are_zero(backend, device):
    tensors = {name: normal(20, 2, 16, device=device) for name in "qkv"}
    for x in tensors.values():
        x[15:] = torch.nan
    with running_on(backend):
        got = run_with_gradients(attention_with_lse, tensors, q_offsets=torch.tensor([0, 4, 15], device=device))
    assert all((got[name][15:] == 0).all() for name in ("out", "dq", "dk", "dv"))
    assert all(got[name].isfinite().all() for name in ("out", "dq", "dk", "dv"))


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize(
    "options", [{}, {"causal": "top_left"}, {"causal": "bottom_right"}, {"dropout_p": 0.2}], ids=str
)
@every_backend
def test_packed_and_padded_agree_bit_for_bit(backend, options, dtype, device):
    q_lengths, k_lengths = [13, 64, 1, 70, 0], [64, 9, 30, 70, 5]
    if options.get("dropout_p"):
        options = {**options, "seed": torch.tensor([123456789], device=device)}
    padded = {name: torch.zeros(5, 2, 70, 16, dtype=dtype, device=device) for name in ("q", "k", "v", "dout")}
    for b in range(5):
        for name, n in (("q", q_lengths[b]), ("k", k_lengths[b]), ("v", k_lengths[b]), ("dout", q_lengths[b])):
            padded[name][b, :, :n] = normal(2, n, 16, dtype=dtype, device=device)

    def pack(x, lengths):
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]).contiguous().requires_grad_()

    def offsets(lengths):
        return torch.tensor([0, *lengths], device=device).cumsum(0)

    packed = [pack(padded[name], lengths) for name, lengths in (("q", q_lengths), ("k", k_lengths), ("v", k_lengths))]
    dout = pack(padded["dout"], q_lengths).detach()
    with running_on(backend):
        out, lse = attention_with_lse(*packed, q_offsets=offsets(q_lengths), k_offsets=offsets(k_lengths), **options)
        gradients = torch.autograd.grad(out, packed, dout)

    def run_padded(batch, rows):
        inputs = [padded[name][batch, :, : rows if name == "q" else 70].detach().requires_grad_() for name in "qkv"]
        with running_on(backend):
            out, lse = attention_with_lse(*inputs, k_lengths=torch.tensor(k_lengths, device=device)[batch], **options)
            return out, lse, *torch.autograd.grad(out, inputs, padded["dout"][batch, :, :rows])

    # bottom_right counts from a sequence's own last query, which padding would move: one by one there
    one_by_one = options.get("causal") == "bottom_right"
    together = None if one_by_one else run_padded(slice(None), 70)
    for b, (n, s) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        if n == 0:
            continue
        found = run_padded(slice(b, b + 1), n) if one_by_one else [x[b : b + 1] for x in together]
        out_p, lse_p, dq_p, *dkv_p = (x[0] for x in found)
        q0, k0 = sum(q_lengths[:b]), sum(k_lengths[:b])
        assert_equal(out[q0 : q0 + n], out_p[:, :n].transpose(0, 1))
        assert_equal(lse[q0 : q0 + n], lse_p[:, :n].transpose(0, 1))
        assert_equal(gradients[0][q0 : q0 + n], dq_p[:, :n].transpose(0, 1))
        for got, expected in zip(gradients[1:], dkv_p, strict=True):
            assert_equal(got[k0 : k0 + s], expected[:, :s].transpose(0, 1))


@every_backend
def test_packed_with_every_mask(backend, device):
    tensors = {
        "q": normal(60, 4, 16, device=device),
        "k": normal(90, 2, 16, device=device),
        "v": normal(90, 2, 16, device=device),
        "bias": normal(4, 40, 70, device=device),
    }
    assert_backend_matches(
        attention_with_lse,
        backend,
        tensors,
        q_offsets=torch.tensor([0, 40, 40, 60], device=device),
        k_offsets=torch.tensor([0, 70, 75, 90], device=device),
        k_lengths=torch.tensor([66, 5, 9], device=device),
        keep=torch.rand(3, 1, 40, 70, device=device) < 0.8,
        causal="bottom_right",
        window=(50, -1),
    )


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@every_backend
def test_dropout_matches_the_reference(backend, dtype, device):
    tensors = qkv(S=83, dtype=dtype, device=device)
    seed = torch.tensor([-(2**62) + 12345], device=device)
    assert_backend_matches(attention, backend, tensors, dropout_p=0.3, seed=seed, causal="bottom_right")


@every_backend
def test_dropped_weights_are_those_that_philox_says(backend, device):
    tensors, seed = qkv(device=device), torch.tensor([77], device=device)
    with running_on(backend):
        _, lse = attention_with_lse(**tensors, dropout_p=0.25, seed=seed)
        weights = attention_weights(tensors["q"], tensors["k"], lse, dropout_p=0.25, seed=seed)
        whole = attention_weights(tensors["q"], tensors["k"], lse)
    b, h, row, col = torch.meshgrid(*(torch.arange(n, device=device) for n in weights.shape), indexing="ij")
    kept = _philox.keep_mask(seed, 0.25, b * 2 + h, row, col)
    assert_equal(weights != 0, kept)
    torch.testing.assert_close(weights[kept], whole[kept] / 0.75)


@every_backend
def test_dropout_is_governed_by_torch_s_seed_and_fresh_each_call(backend, device):
    tensors = qkv(device=device)
    with running_on(backend):
        torch.manual_seed(5)
        first, second = attention(**tensors, dropout_p=0.5), attention(**tensors, dropout_p=0.5)
        torch.manual_seed(5)
        again = attention(**tensors, dropout_p=0.5)
    assert_equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0])
@every_backend
def test_dropout_of_nothing_and_of_everything(backend, p, device):
    tensors, seed = qkv(device=device), torch.tensor([1], device=device)
    got = assert_backend_matches(attention, backend, tensors, dropout_p=p, seed=seed)
    if p == 1.0:
        assert (got["out"] == 0).all()
    else:
        with running_on(backend):
            assert_equal(got["out"], attention(**tensors))


# ---------------------------------------------------------------- determinism


@every_backend
def test_the_same_bits_again_and_on_any_number_of_threads(backend, device):
    tensors = {**qkv(B=1, H=2, L=260, S=300, D=24, device=device), "bias": normal(1, 1, 260, 300, device=device)}
    with running_on(backend):
        runs = []
        for count in (1, 2, 2, 5) if backend == "cpu" else (1, 2):  # of no other's are there any
            with threads(count):
                runs.append(run_with_gradients(attention_with_lse, tensors, causal="bottom_right"))
    for other in runs[1:]:
        assert_equal(other, runs[0])


@every_backend
def test_a_row_does_not_depend_on_the_rest_of_the_batch(backend, device):
    tensors = qkv(B=3, L=100, S=130, device=device)
    with running_on(backend):
        whole = run_with_gradients(attention_with_lse, tensors)
        alone = attention_with_lse(**{name: x[1:2, :, : (50 if name == "q" else 130)] for name, x in tensors.items()})
    assert_equal(alone[0], whole["out"][1:2, :, :50])
    assert_equal(alone[1], whole["out1"][1:2, :, :50])


@every_backend
def test_an_all_true_mask_changes_no_bit(backend, device):
    tensors = qkv(S=130, device=device)
    with running_on(backend):
        plain = run_with_gradients(attention, tensors)
        masked = run_with_gradients(attention, tensors, keep=torch.ones(70, 130, dtype=torch.bool, device=device))
        causal = run_with_gradients(attention, tensors, causal="top_left")
        lower = torch.ones(70, 130, dtype=torch.bool, device=device).tril()
        as_mask = run_with_gradients(attention, tensors, keep=lower)
    assert_same(plain, masked, backend, device)
    assert_same(causal, as_mask, backend, device)


# ---------------------------------------------------------------- errors, and what else users lean on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 2, 5)}, r"q must have shape \(B, H, L, D\), got \(2, 2, 5\)"),
        ({"k": torch.zeros(2, 2, 5, 16)}, "k and v must have the same shape"),
        ({"q": torch.zeros(2, 3, 70, 16)}, "heads of q must be a multiple of those of k and v, got 3 and 2"),
        ({"q": torch.zeros(2, 2, 70, 8)}, "q and k must agree in head width, got 8 and 16"),
        ({"q": torch.zeros(3, 2, 70, 16)}, "q and k must agree in batch, got 3 and 2"),
        ({"q": torch.zeros(2, 2, 70, 16).half()}, "all tensors must have the same dtype, got q: float16"),
        ({"q": torch.zeros(2, 2, 70, 16).int()}, "q must be float32, float16, bfloat16 or float64, got int32"),
        ({"causal": True}, 'causal must be False, "top_left"'),
        ({"window": (-2, 0)}, r"window must be \(left, right\)"),
        ({"keep": torch.ones(70, 70)}, r"keep must be bool \(True = attend\), got torch.float32"),
        ({"keep": torch.ones(69, 70, dtype=torch.bool)}, "keep of shape .* does not broadcast to"),
        ({"bias": torch.ones(70, 70, dtype=torch.bool)}, "bias must be a float tensor"),
        ({"k_lengths": torch.tensor([3, 71])}, r"k_lengths must be between 0 and 70, got 3 \.\.\. 71"),
        ({"k_lengths": torch.tensor([3])}, r"k_lengths must have shape \(2,\), got \(1,\)"),
        ({"k_lengths": torch.tensor([3.0, 4.0])}, "k_lengths must be integers"),
        ({"k_offsets": torch.tensor([0, 2])}, "k_offsets needs q_offsets"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, "seed must be a torch.int64 tensor with one element"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**qkv(), **change})


@pytest.mark.parametrize("offsets", [[0, 30, 20], [5, 20], [0, 90], []], ids=str)
def test_bad_offsets_are_named(offsets):
    x = torch.zeros(70, 2, 16)
    with pytest.raises(ValueError, match="q_offsets"):
        attention(x, x, x, q_offsets=torch.tensor(offsets, dtype=torch.int64))


def test_something_else_than_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"k_lengths must be a torch\.Tensor, got list"):
        attention(**qkv(), k_lengths=[70, 3])
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, got list"):
        attention([1.0], torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_weights_with_dropout_need_the_seed():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="needs the seed"):
        attention_weights(x, x, torch.zeros(1, 1, 3), dropout_p=0.5)


@every_backend
def test_a_head_that_is_too_wide_is_refused_in_words(backend):
    x = torch.zeros(1, 1, 3, 257)
    if op.why_not(backend, x, x, x, None, 1.0, 0.0, None) in (None, "not written yet"):
        pytest.skip(f"attention, {backend}: not there")
    with use_backend(backend), pytest.raises(NotImplementedError, match=r"head width must be 1 \.\.\. 256, got 257"):
        attention(x, x, x)


def test_float64_goes_to_the_reference():
    tensors = in_float64(qkv())
    out = attention(**tensors)
    with use_backend("reference"):
        assert_equal(out, attention(**tensors))


@every_backend
def test_compiled_equals_eager(backend):
    tensors = qkv()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal="top_left") * 2.0, backend="eager")
    with running_on(backend):
        expected = attention(**tensors, causal="top_left") * 2.0
        assert_equal(compiled(**tensors), expected)


@every_backend
def test_16_bit_gradients_are_as_good_as_torch_s(backend):
    """The judge of the judge: torch's own attention in bfloat16, not our reference, as the naive one."""
    tensors = qkv(B=2, H=2, L=128, S=128, D=64, dtype=torch.bfloat16)

    def torch_attention(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) / 8.0, dim=-1) @ v

    with running_on(backend):
        got = run_with_gradients(attention, tensors)
    exact = run_with_gradients(torch_attention, in_float64(tensors), rounded_to=torch.bfloat16)
    assert_matches(got, exact, run_with_gradients(torch_attention, tensors))
