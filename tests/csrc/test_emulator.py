"""The emulator that CUDA kernels run in without a GPU: what it computes, and that it finds what it is there to find."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.csrc import building
from tests.csrc.test_common import HALVES, all_16_bit, assert_same_numbers, awkward_floats

SOURCE = Path(__file__).with_name("probe_emulator.cu")
ORDERS = ("fwd", "rev", "rand:1", "rand:2", "lifo", "revlifo")
ASYNC = ("lazy", "eager")

# Kernels that are wrong, in the order of `enum Wrong`, and what the emulator says of each.
WRONG = {
    "some_threads_at_a_barrier": r"deadlock, 32 of 64 threads have not ended; thread \d+ waits in __syncthreads at p",
    "two_barriers_at_once": r"divergent: it is in __syncthreads at probe_emulator.cu:",
    "a_lane_outside_its_mask": r"lane \d+ is not in its own mask ffff0000",
    "a_shuffle_from_an_absent_lane": r"__shfl_sync reads lane 9, which takes no part in it",
    "two_masks": r"divergent: it is in __shfl_sync at probe_emulator.cu:\d+, .* \(keys fffffff[fd] and fffffff[fd]\)",
    "half_a_warp_in_mma": r"deadlock, 32 of 64 threads have not ended; thread \d+ waits in mma.sync at p",
    "a_misaligned_copy": r"cp.async of 16 bytes between addresses that are not multiples of it",
    "a_misaligned_matrix_row": r"ldmatrix from a row that does not begin at a multiple of 16",
    "a_copy_not_waited_for": r"ended with copies \(cp.async\) that it did not wait for",
    "more_bytes_than_the_copy": r"cp.async of 8 bytes of 4",
    "no_dynamic_memory": r"dynamic shared memory is used, and the launch asked for none",
    "a_misaligned_vector": r"__ldg from an address that is not aligned",
}


pytestmark = pytest.mark.emulated
racy = pytest.mark.skipif(emulated.mode() == "tsan", reason="the race that this test plants would end the process")


@pytest.fixture(scope="module", params=["plain", "ucontext"] if emulated.mode() == "plain" else [emulated.mode()])
def probe(request):
    library = ctypes.CDLL(str(building.build_library([SOURCE], request.param)))
    for name in ("reverse", "product_f16", "product_bf16", "product_tf32", "warp", "pipeline", "count", "wrong"):
        getattr(library, f"probe_{name}").restype = ctypes.c_char_p
    return library


def call(function, *arguments) -> str | None:
    """Tensors as addresses, integers as 64-bit ones; what the launch threw."""
    given = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments)
    error = function(*given)
    return error.decode() if isinstance(error, bytes) else None


@pytest.fixture(params=[f"{order} {when}" for order in ORDERS for when in ASYNC])
def schedule(request, monkeypatch):
    order, when = request.param.split()
    monkeypatch.setenv("EMU_ORDER", order)
    monkeypatch.setenv("EMU_ASYNC", when)


def small_integers(*shape: int) -> Tensor:
    """Numbers whose products and sums every dtype here holds exactly."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_read_exactly(probe, dtype):
    x = all_16_bit(dtype)
    out = torch.empty(x.shape)
    call(getattr(probe, f"probe_{HALVES[dtype]}_to_f32"), x, out, x.numel())
    assert_same_numbers(out, x.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits_is_to_nearest_even(probe, dtype):
    x = awkward_floats()
    out = torch.empty(x.shape, dtype=dtype)
    call(getattr(probe, f"probe_f32_to_{HALVES[dtype]}"), x, out, x.numel())
    assert_same_numbers(out, x.to(dtype))


def test_blocks_threads_and_dynamic_shared_memory(probe, schedule):
    x = torch.randn(5, 96)
    out = torch.empty_like(x)
    assert call(probe.probe_reverse, x, out, 5, 96, 1) is None
    assert torch.equal(out, x.flip(1))


@racy
def test_a_missing_barrier_shows_in_some_order(probe, monkeypatch):
    x, wrong = torch.randn(1, 96), []
    for order in ORDERS:
        monkeypatch.setenv("EMU_ORDER", order)
        out = torch.empty_like(x)
        assert call(probe.probe_reverse, x, out, 1, 96, 0) is None
        wrong.append(not torch.equal(out, x.flip(1)))
    assert all(wrong)  # no order runs all threads up to a place where none waits


@pytest.mark.parametrize("dtype", HALVES)
def test_every_way_to_load_a_tile_gives_the_product(probe, dtype):
    a, b = small_integers(16, 16), small_integers(16, 8)
    out = torch.empty(4, 16, 8)
    name = f"probe_product_{HALVES[dtype]}"
    assert call(getattr(probe, name), a.to(dtype), b.to(dtype), out) is None
    assert torch.equal(out, (a @ b + 1).expand(4, 16, 8))


def test_tf32_drops_bits_and_its_split_brings_them_back(probe):
    a, b = small_integers(16, 8), small_integers(8, 8)
    out = torch.empty(2, 16, 8)
    assert call(probe.probe_product_tf32, a, b, out) is None
    assert torch.equal(out, (a @ b).expand(2, 16, 8))
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    assert call(probe.probe_product_tf32, a, b, out) is None
    exact = a.double() @ b.double()
    scale = (a.double().abs() @ b.double().abs()).max()
    plain, split = ((each.double() - exact).abs().max() / scale for each in out)
    assert 2**-14 < plain < 2**-10 and split < 2**-20


@pytest.mark.parametrize("width", [32, 16, 8])
def test_the_collectives_of_a_warp(probe, schedule, width):
    x = torch.randn(32)
    out = torch.empty(8, 32)
    assert call(probe.probe_warp, x, out, width) is None
    lane = torch.arange(32)
    first = lane // width * width

    def read(wanted, outside):
        return x[torch.where(outside, lane, wanted.clamp(0, 31))]

    assert torch.equal(out[0], x[first + (lane * 7 + 3) % width])
    assert torch.equal(out[1], read(lane ^ 5, (lane ^ 5) >= first + width))
    assert torch.equal(out[2], read(lane + 3, lane + 3 >= first + width))
    assert torch.equal(out[3], read(lane - 3, lane - 3 < first))
    assert torch.equal(out[4], (x > 0).float())
    assert torch.equal(out[5], (x > 0).sum().expand(32).float())
    assert torch.equal(out[6], torch.ones(32))
    assert torch.equal(out[7], torch.where(lane < 8, x[2], x[20]))


def test_votes_of_a_block(probe, schedule):
    x = torch.randn(80)
    out = torch.empty(80)
    assert call(probe.probe_count, x, out, 80) is None
    assert torch.equal(out, ((x > 0).sum() + 10000.0).expand(80))


@pytest.mark.parametrize("valid", [128, 40, 0])
def test_copies_land_by_their_wait_and_are_zero_beyond_what_is_read(probe, schedule, valid):
    tiles = 5
    x = torch.randn(tiles, 32)
    x_read = x.masked_fill(torch.arange(32) * 4 >= valid, 0.0)
    out = torch.empty(tiles, 32)
    assert call(probe.probe_pipeline, x, out, tiles, valid, 0) is None
    assert torch.equal(out, x_read.flip(1))


@racy
def test_a_wait_for_too_few_groups_shows_where_copies_are_lazy(probe, monkeypatch):
    x, out = torch.randn(5, 32), torch.empty(5, 32)
    for when, right in (("eager", True), ("lazy", False)):
        monkeypatch.setenv("EMU_ASYNC", when)
        assert call(probe.probe_pipeline, x, out, 5, 128, 1) is None
        assert torch.equal(out, x.flip(1)) == right


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(probe, schedule, wrong):
    error = call(probe.probe_wrong, torch.zeros(64), list(WRONG).index(wrong), 64, 1024, 1)
    assert error is not None and re.match(rf"block \(0, 0, 0\).*: {WRONG[wrong]}", error), error


@pytest.mark.parametrize(
    ("threads", "shared", "blocks", "sentence"),
    [
        (1056, 0, 1, "a block has 1 to 1024 threads, not 1056"),
        (0, 0, 1, "a block has 1 to 1024 threads, not 0"),
        (64, 233000, 1, "a block has at most 227 KiB of shared memory, not 233000 bytes"),
        (64, 232400, 1, "more than 227 KiB of shared memory in all"),
        (64, 0, 0, "a grid has at least one block"),
    ],
)
def test_a_launch_that_no_device_takes(probe, threads, shared, blocks, sentence):
    error = call(probe.probe_wrong, torch.zeros(64), len(WRONG), threads, shared, blocks)
    assert error is not None and sentence in error


def test_shared_memory_is_nan_in_every_block(probe):
    out = torch.ones(64)
    assert call(probe.probe_wrong, out, len(WRONG), 64, 0, 3) is None
    assert bool((out == 1).all())


def test_an_error_leaves_the_emulator_usable(probe, schedule):
    x, out = torch.randn(2, 64), torch.empty(2, 64)
    for number in (0, 3, 5):
        assert call(probe.probe_wrong, torch.zeros(64), number, 64, 1024, 1) is not None
        assert call(probe.probe_reverse, x, out, 2, 64, 1) is None
        assert torch.equal(out, x.flip(1))


@pytest.mark.parametrize(("variable", "value"), [("EMU_ORDER", "sideways"), ("EMU_ASYNC", "late")])
def test_an_unknown_schedule_is_refused(probe, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    error = call(probe.probe_count, torch.zeros(32), torch.zeros(32), 32)
    assert error is not None and f"{variable} must be" in error and error.endswith(f"got {value}")
