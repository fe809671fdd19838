"""CUDA kernels in the emulator, under every order of threads and both extremes of asynchronous copies: right by the
oracle, and the same bits each time. Under a sanitizer (tests/csrc/sanitized.py) a few schedules are enough: ASan looks
at addresses, and TSan finds a race whatever the order was.
"""

from __future__ import annotations

import pytest
import torch

from tests import emulated
from tests.csrc.calls import CALLS
from tests.inputs import running_on
from tests.oracle import assert_backend_matches, assert_equal, run_with_gradients

ORDERS = {"plain": ("fwd", "rev", "rand:1", "rand:2", "lifo", "revlifo"), "asan": ("fwd",), "tsan": ("fwd",)}
ASYNC = ("lazy", "eager")

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not emulated.installed(), reason="there is a CUDA device, or no compiler"),
]


def names():
    torch.manual_seed(0)
    return [(op, name) for op, calls in CALLS.items() for name, _ in calls()]


@pytest.mark.parametrize(("op", "name"), names())
def test_every_schedule_gives_the_same_right_bits(op, name, monkeypatch):
    function, tensors, options = dict(CALLS[op]())[name]
    dtype = next(x.dtype for x in tensors.values() if x.is_floating_point())  # as the oracle rounds upstream gradients
    first = assert_backend_matches(function, "cuda", tensors, **options)
    for order in ORDERS[emulated.mode()]:
        for when in ASYNC:
            monkeypatch.setenv("EMU_ORDER", order)
            monkeypatch.setenv("EMU_ASYNC", when)
            with running_on("cuda"):
                assert_equal(run_with_gradients(function, tensors, rounded_to=dtype, **options), first)
