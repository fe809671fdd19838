"""csrc/common under every instruction set this processor has, compiled as the build does: conversions of every 16-bit
number, masked tails, exp, and the dropout bits.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_transformer.kernels import _native, _philox

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_build"))
try:
    from native import CPU_FLAGS, HOST_FLAGS, INSTRUCTION_SETS
finally:
    sys.path.pop(0)

ISAS = list(INSTRUCTION_SETS)
HALVES = {torch.float16: "f16", torch.bfloat16: "bf16"}
# The last float16 is 65504 and the last bfloat16 about 3.39e38; halfway to what would follow, rounding turns to
# infinity. 2^-25 is half of float16's smallest, and a tie.
BOUNDARIES = [65504.0, 65519.99, 65520.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 2.0**-26, 3.3e38]


@pytest.fixture(scope="module", params=ISAS)
def probe(request, tmp_path_factory):
    if ISAS.index(request.param) > ISAS.index(_native.library().isa()):
        pytest.skip(f"this processor has no {request.param}")
    target = tmp_path_factory.mktemp("probe") / f"{request.param}.so"
    flags = [*HOST_FLAGS, *CPU_FLAGS, f"-DFT_ISA={request.param}", *INSTRUCTION_SETS[request.param]]
    source = Path(__file__).with_name("probe.cpp")
    command = ["g++", *flags, "-Werror", "-fvisibility=default", "-shared", f"-I{ROOT / 'csrc'}", str(source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def call(function, *arguments) -> None:
    """Tensors as addresses, integers as 64-bit ones."""
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments))


def all_16_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16).view(dtype)


def awkward_floats() -> Tensor:
    """Numbers around every rounding decision: each 16-bit number, its neighbours' midpoints and what is beside them."""
    numbers = [torch.tensor([*BOUNDARIES, math.inf, math.nan, 0.0]), torch.randn(4096) * torch.randn(4096).exp() * 100]
    for dtype in HALVES:
        grid = all_16_bit(dtype).float()
        grid = grid[grid.isfinite()].sort().values
        middle = (grid[1:].double() / 2 + grid[:-1].double() / 2).float()
        numbers += [grid, middle, torch.nextafter(middle, torch.tensor(math.inf)), torch.nextafter(middle, -middle)]
    x = torch.cat(numbers)
    return torch.cat([x, -x])


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(bits)[~got.isnan()], expected.view(bits)[~expected.isnan()])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_read_exactly(probe, dtype):
    x = all_16_bit(dtype)
    for kind, step in (("probe", [probe.probe_width()]), ("probe_scalar", [])):
        out = torch.empty(x.shape)
        call(getattr(probe, f"{kind}_{HALVES[dtype]}_to_f32"), x, out, x.numel(), *step)
        assert_same_numbers(out, x.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits_is_to_nearest_even(probe, dtype):
    x = awkward_floats()
    for kind, step in (("probe", [probe.probe_width()]), ("probe_scalar", [])):
        out = torch.empty(x.shape, dtype=dtype)
        call(getattr(probe, f"{kind}_f32_to_{HALVES[dtype]}"), x, out, x.numel(), *step)
        assert_same_numbers(out, x.to(dtype))


@pytest.mark.parametrize("names", ["f32_to_f32", "f16_to_f32", "bf16_to_f32", "f32_to_f16", "f32_to_bf16"])
def test_tails_read_and_write_what_they_were_given_and_no_more(probe, names):
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    source, target = (kinds[name] for name in names.split("_to_"))
    x = torch.randn(23).to(source)
    for step in range(1, probe.probe_width() + 1):
        for count in (1, step, 23):
            out = torch.full((count + 16,), 7.0, dtype=target)
            call(getattr(probe, f"probe_{names}"), x, out, count, step)
            assert torch.equal(out[:count], x[:count].to(target))
            assert bool((out[count:] == 7).all())


def test_exp_is_good_to_2_ulp_wherever_it_is_not_0(probe):
    x = torch.cat([torch.linspace(-87.33, 88.7228, 2**18), torch.linspace(-1e-3, 1e-3, 2**12), -torch.rand(2**12) * 20])
    out = torch.empty(x.shape)
    call(probe.probe_exp, x, out, x.numel())
    exact = x.double().exp()
    _, exponent = torch.frexp(exact)
    ulp = 2.0 ** (exponent - 24).double()
    assert ((out.double() - exact).abs() / ulp).max() < 2


def test_exp_at_its_edges(probe):
    special = {0.0: 1.0, -math.inf: 0.0, math.inf: math.inf, -87.34: 0.0, -1e30: 0.0, 88.73: math.inf}
    x = torch.tensor([*special, *[0.0] * (-len(special) % 16)])
    out = torch.empty(x.shape)
    call(probe.probe_exp, x, out, x.numel())
    assert out[: len(special)].tolist() == list(special.values())
    x = torch.full((16,), math.nan)
    call(probe.probe_exp, x, out := torch.empty(16), 16)
    assert bool(out.isnan().all())


def test_the_relative_error_of_exp_shifted(probe):
    x = torch.cat([torch.linspace(-87.33, 87, 2**18), torch.linspace(-1e-3, 1e-3, 2**12), -torch.rand(2**12) * 20])
    out = torch.empty(x.shape)
    call(probe.probe_exp_shifted, x, out, x.numel())
    assert bool(((out.double() / x.double().exp() - 1).abs() < 1.2e-7 + x.double().abs() / 7e7).all())


def test_exp_shifted_at_its_edges(probe):
    special = {0.0: 1.0, -87.34: 0.0, -math.inf: 0.0, -1e30: 0.0}
    x = torch.tensor([*special, *[0.0] * (-len(special) % 16)])
    out = torch.empty(x.shape)
    call(probe.probe_exp_shifted, x, out, x.numel())
    assert out[: len(special)].tolist() == list(special.values())
    call(probe.probe_exp_shifted, torch.full((16,), math.nan), out := torch.empty(16), 16)
    assert bool(out.isnan().all())


def test_a_vectors_sum(probe):
    width = probe.probe_width()
    x = torch.randn(1000, width)
    out = torch.empty(1000)
    call(probe.probe_reduce_sum, x, out, x.numel())
    bound = width.bit_length() * torch.finfo(torch.float32).eps * x.abs().double().sum(1)
    assert bool(((out.double() - x.double().sum(1)).abs() <= bound).all())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567887654321])
def test_the_dropout_bits_are_those_of_python(probe, seed):
    width, blocks = probe.probe_width(), 64
    counter = torch.randint(0, 2**32, (blocks, 3, width))
    counter[0], counter[1] = 0, 2**32 - 1
    out = torch.zeros(blocks, 4, width, dtype=torch.int32)
    call(probe.probe_philox, counter.to(torch.int32), out, blocks, seed)
    block, row, outer = counter.unbind(1)
    for lane in range(4):
        expected = _philox.words(torch.tensor([seed]), outer, row, block * 4 + lane)
        assert torch.equal(out[:, lane].long() & 0xFFFFFFFF, expected)
