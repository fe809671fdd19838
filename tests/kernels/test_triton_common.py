"""The floor of the Triton backends: dropout bits, what is refused, and the interpreter that runs them without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused_transformer.kernels import _philox, use_backend

pytest.importorskip("triton")
pytest.importorskip("numpy")

import numpy as np
import triton
import triton.language as tl

from fused_transformer.kernels import _triton
from tests import interpreter

NO_INTERPRETER = "Triton compiles here, and its interpreter is not used"
interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason=NO_INTERPRETER)


def skip_unless_kernels_run_on(device: str) -> None:
    if device == "cpu" and not _triton.INTERPRETED:
        pytest.skip(NO_INTERPRETER)


# ---------------------------------------------------------------- dropout bits


@triton.jit
def kept_kernel(
    seed_ptr, row_ptr, outer_ptr, out_ptr, threshold, first_col, EACH: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    offs_r = tl.arange(0, R)
    outer = tl.load(outer_ptr + offs_r)[:, None] if EACH else tl.load(outer_ptr)
    kept = _triton.kept(tl.load(seed_ptr), threshold, outer, tl.load(row_ptr + offs_r), first_col, C)  # [R, C]
    tl.store(out_ptr + offs_r[:, None] * C + tl.arange(0, C)[None, :], kept.to(tl.int8))


def kept(seed: Tensor, p: float, outer: Tensor, row: Tensor, first_col: int, cols: int) -> Tensor:
    out = torch.empty(len(row), cols, dtype=torch.int8, device=row.device)
    threshold, _ = _triton.dropout_numbers(seed, p)
    arguments = (seed, row, outer, out, threshold, first_col)
    kept_kernel[(1,)](*arguments, EACH=outer.numel() > 1, R=len(row), C=cols)
    return out == 1


SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32), 0x123456789ABCDEF, -(2**40) - 4711)
ODDS = (0.0, 2.0**-40, 2.0**-32, 0.1, 0.5, 0.50001, 0.999, 1.0)


@pytest.mark.parametrize("p", ODDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kernels_keep_what_philox_says(seed, p, device):
    skip_unless_kernels_run_on(device)
    seed = torch.tensor([seed], device=device)
    row = torch.tensor([0, 1, 2, 77, 10**6, 2**31 - 1, 2**31, 2**32 - 1], device=device)
    for first_col, cols, outer in ((0, 16, 0), (64, 64, 3), (2**20, 4, 2**31)):
        outer = torch.tensor([outer], device=device)
        got = kept(seed, p, outer, row, first_col, cols)
        col = first_col + torch.arange(cols, device=device)
        assert torch.equal(got, _philox.keep_mask(seed, p, outer, row[:, None], col))


def test_each_row_may_have_an_outer_of_its_own(device):
    skip_unless_kernels_run_on(device)
    seed, row = torch.tensor([99], device=device), torch.arange(16, device=device)
    outer = torch.arange(16, device=device) * 1000
    got = kept(seed, 0.5, outer, row, 8, 32)
    expected = _philox.keep_mask(seed, 0.5, outer[:, None], row[:, None], 8 + torch.arange(32, device=device))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rows_may_be_of_either_integer_type(integers, device):
    skip_unless_kernels_run_on(device)
    seed, row = torch.tensor([-5], device=device), torch.arange(32, device=device)
    outer = torch.zeros(1, dtype=integers, device=device)
    assert torch.equal(kept(seed, 0.3, outer, row.to(integers), 0, 64), _philox.keep_rows(seed, 0.3, 32, 64))


def test_the_threshold_is_an_int32_with_the_right_bits():
    seed = torch.tensor([1])
    for p in ODDS:
        threshold, scale = _triton.dropout_numbers(seed, p)
        assert -(2**31) <= threshold < 2**31
        assert threshold % 2**32 == _philox.threshold(p)
        assert scale == _philox.keep_scale(p)
    assert _triton.dropout_numbers(None, 0.0) == (0, 1.0)


# ---------------------------------------------------------------- what is refused


def test_the_interpreter_is_used_only_where_it_is_asked_for(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    assert _triton.refuses_tensors(x=x) == "x must be on a CUDA device, got cpu"
    with use_backend("cpu"):
        assert _triton.refuses_tensors(x=x) == "x must be on a CUDA device, got cpu"
    with use_backend("triton"):
        assert _triton.refuses_tensors(x=x, bias=None, weight=x) is None
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        assert _triton.refuses_tensors(bias=None, weight=x) == "weight must be on a CUDA device, got cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_other_dtypes_are_refused(dtype, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    with use_backend("triton"):
        for allowed in (torch.float32, torch.float16, torch.bfloat16):
            assert _triton.refuses_tensors(q=torch.zeros(2, dtype=allowed)) is None
        name = str(dtype).removeprefix("torch.")
        expected = f"k must be float32, float16 or bfloat16, got {name}"
        assert _triton.refuses_tensors(q=torch.zeros(2), k=torch.zeros(2, dtype=dtype)) == expected


def test_old_devices_are_refused(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    with use_backend("triton"):
        for capability, why in (((7, 5), "cpu has compute capability 7.5, and these kernels need 8.0"), ((8, 6), None)):
            monkeypatch.setattr(_triton, "capability", lambda device, capability=capability: capability)
            assert _triton.refuses_tensors(x=torch.zeros(2)) == why


def test_float32_products_are_in_tf32_only_where_torchs_are(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            matmul.allow_tf32 = allowed
            assert _triton.dot_precision() == precision
    finally:
        matmul.allow_tf32 = before


# ---------------------------------------------------------------- the interpreter's bfloat16


def some_float32() -> Tensor:
    """Every exponent and sign, with what lies around a tie in the last kept bit, and random bits."""
    kept_bits = torch.arange(0, 2**16, 1, dtype=torch.int64)[:, None] * 2**16
    dropped_bits = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    around = (kept_bits + dropped_bits).flatten()
    bits = torch.cat([around, torch.randint(0, 2**32, (50_000,))])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def test_float32_becomes_bfloat16_as_in_torch():
    x = some_float32()
    got = torch.from_numpy(interpreter.to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    expected = x.bfloat16()
    assert bool(x.isnan().any()) and bool(x.isinf().any()) and bool((x.abs() < 2.0**-126).any())
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(bits_of(got)[~x.isnan()], bits_of(expected)[~x.isnan()])


def test_bfloat16_becomes_float32_as_in_torch():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    got = torch.from_numpy(interpreter.to_float32(bits))
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_shapes_and_the_empty_survive_conversion():
    for shape in ((), (0,), (3, 0), (2, 3)):
        assert interpreter.to_bfloat16(np.ones(shape, np.float32)).shape == shape


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@interpreted
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_interpreted_casts_are_torchs(source, target):
    x = some_float32()[: 2**18].nan_to_num(posinf=math.inf, neginf=-math.inf)
    x = x.clamp(-(2.0**30), 2.0**30).int() if source == torch.int32 else x.to(source)
    out = torch.empty(len(x), dtype=target)
    cast_kernel[(len(x) // 2**16,)](x, out, BLOCK=2**16)
    # float64 reaches bfloat16 through float32 in the interpreter, as it does in torch
    assert torch.equal(out, x.to(target))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.load(out_ptr + offs))
    tl.store(out_ptr + offs, product)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpreted_products_are_of_values_and_in_float32(dtype):
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.randn(32, 32)
    out = c.clone()
    dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, c + a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def _doubled(x):
    return tl.sum(tl.interleave(x, x), 0)


@triton.jit
def nested_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, _doubled(tl.load(x_ptr + tl.arange(0, BLOCK))))


@interpreted
def test_functions_called_by_kernels_run_in_the_interpreter_launch_after_launch():
    x, out = torch.randn(64), torch.empty(1)
    plain = tl.load
    for _ in range(3):
        nested_kernel[(1,)](x, out, BLOCK=64)
        torch.testing.assert_close(out[0], 2 * x.sum())
        assert tl.load is plain, "outside a launch Triton's language is its own again"


@triton.jit
def topk_kernel(x_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, K), tl.topk(tl.load(x_ptr + tl.arange(0, N)), K))


@interpreted
@pytest.mark.parametrize("kept", [2, 16, 64])
def test_the_interpreter_finds_the_greatest_64_bit_integers(kept):
    x = torch.randint(-(2**62), 2**62, (64,))
    x[3] = x[5]
    out = torch.empty(kept, dtype=torch.int64)
    topk_kernel[(1,)](x, out, N=64, K=kept)
    assert torch.equal(out, x.topk(kept).values)
