"""mbarrier, TMA and wgmma in the emulator: a pipelined product is right under every schedule, wrong ones are found."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from tests import emulated
from tests.csrc import building
from tests.csrc.sanitized import command_and_environment
from tests.csrc.test_emulator import call, schedule, small_integers  # noqa: F401  (schedule is a fixture)

SOURCE = Path(__file__).with_name("probe_hopper.cu")
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
SCHEDULES = [(order, when) for when in ("lazy", "eager") for order in ("fwd", "rev", "rand:1", "rand:2", "lifo")]

# What some schedule says of each kernel that is wrong. The numbers are those of `enum Wrong`.
TOO_MANY = "more arrivals at an mbarrier than it was made for, in one phase"
WRONG = {
    "the_producer_does_not_wait": (1, TOO_MANY),
    "too_few_bytes_expected": (2, "deadlock"),
    "the_consumer_does_not_wait": (3, "wrong"),
    "no_wait_for_the_product": (4, "wrong"),
    "no_fence": (5, "wgmma without wgmma.fence after its registers were last used"),
    "one_arrival_too_few": (7, "deadlock"),
    "the_phase_never_flips": (8, TOO_MANY),
    "no_barrier_after_init": (9, "an mbarrier is used before mbarrier.init"),
    "a_wrong_step": (10, "wrong"),
    "arrives_twice": (11, TOO_MANY),
}
RELEASED_BEFORE_THE_WAIT = 6  # no schedule shows it: a race, which TSan finds
PLANTED = "FUSED_TRANSFORMER_PLANTED_RACE"


@pytest.fixture(scope="module")
def probe():
    library = ctypes.CDLL(str(building.build_library([SOURCE], emulated.mode())))
    for name in ("multiply", "wrong", "ping_pong"):
        getattr(library, f"probe_{name}").restype = ctypes.c_char_p
    return library


def multiply(probe, a, b, rows_are_k=True, in_registers=False):
    """(error, a b)"""
    (M, K), columns = a.shape, b.shape[1]
    out = torch.full((M, columns), torch.nan)
    stored = b if rows_are_k else b.t().contiguous()
    numbers = (DTYPES[a.dtype], int(rows_are_k), columns)
    error = call(probe.probe_multiply, *numbers, a, stored, out, M, K, int(in_registers))
    return error, out


def multiply_wrongly(probe, wrong, a, b):
    out = torch.full((a.shape[0], 64), torch.nan)
    return call(probe.probe_wrong, wrong, a, b, out, *a.shape), out


@pytest.mark.parametrize("in_registers", [False, True], ids=["tile", "registers"])
@pytest.mark.parametrize("rows_are_k", [False, True], ids=["rows_of_k", "columns_of_k"])
@pytest.mark.parametrize("columns", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_exact_where_they_can_be(probe, dtype, columns, rows_are_k, in_registers):
    for M, K in ((64, 64), (100, 200), (1, 16)):  # 200: the last box reaches beyond the tensor
        a, b = small_integers(M, K), small_integers(K, columns)
        error, out = multiply(probe, a.to(dtype), b.to(dtype), rows_are_k, in_registers)
        assert error is None
        assert torch.equal(out, a @ b)


def test_every_schedule_gives_the_product(probe, schedule):  # noqa: F811
    a, b = small_integers(70, 328), small_integers(328, 64)
    error, out = multiply(probe, a.bfloat16(), b.bfloat16())
    assert error is None
    assert torch.equal(out, a @ b)


def test_named_barriers_hand_over(probe, schedule):  # noqa: F811
    out = torch.zeros(1)
    assert call(probe.probe_ping_pong, out) is None
    assert out.item() == 0b0101010101


@pytest.mark.skipif(emulated.mode() == "tsan", reason="the races that this test plants would end the process")
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_shows_in_some_schedule(probe, monkeypatch, wrong):
    a, b = small_integers(64, 448), small_integers(448, 64)
    number, sentence = WRONG[wrong]
    seen = []
    for order, when in SCHEDULES:
        monkeypatch.setenv("EMU_ORDER", order)
        monkeypatch.setenv("EMU_ASYNC", when)
        error, out = multiply_wrongly(probe, number, a.bfloat16(), b.bfloat16())
        seen.append(error or ("right" if torch.equal(out, a @ b) else "wrong"))
    assert any(sentence in what for what in seen), "\n".join(seen)


@pytest.mark.skipif(PLANTED not in os.environ, reason="run under TSan, by the test below")
def test_the_planted_race(probe):
    a, b = small_integers(64, 448), small_integers(448, 64)
    multiply_wrongly(probe, RELEASED_BEFORE_THE_WAIT, a.bfloat16(), b.bfloat16())


@pytest.mark.slow
@pytest.mark.skipif(emulated.mode() != "plain", reason="a sanitizer runs already")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="TSan's fibers are tried on x86-64 alone")
def test_tsan_finds_the_race_that_no_schedule_shows():
    command, environment = command_and_environment("tsan", [__file__, "-k", "planted_race"])
    for when in ("lazy", "eager"):
        done = subprocess.run(
            command,
            env={**environment, PLANTED: "1", "EMU_ASYNC": when},
            cwd=building.ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stdout + done.stderr, done.stdout[-3000:]
