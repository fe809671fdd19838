"""Memory that is used again: whose it is, and how much is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fused_transformer.kernels.memory import LEAST_BYTES, empty_pages
from tests.oracle import assert_equal

MIB = 2**20
LIKE = torch.zeros(1)
plain_process = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="under AddressSanitizer malloc and address space are its own"
)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4, 64), (5, 1 << 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_what_is_written_beside_other_memory(shape, dtype):
    before, after = torch.arange(1 << 20), torch.arange(1 << 20)
    memory = empty_pages(*shape, like=torch.zeros(1, dtype=dtype))
    assert memory.shape == shape and memory.dtype == dtype and memory.device.type == "cpu"
    memory.copy_(torch.arange(memory.numel()).remainder(113).view(shape))
    assert_equal(memory, torch.arange(memory.numel()).remainder(113).view(shape).to(dtype))
    assert_equal(before, torch.arange(1 << 20))
    assert_equal(after, torch.arange(1 << 20))


def test_two_that_live_at_once_do_not_share_memory_and_a_view_keeps_its_own():
    first = empty_pages(3 * MIB, like=LIKE).fill_(1)
    view = first[5:9]
    second = empty_pages(3 * MIB, like=LIKE).fill_(2)
    del first
    third = empty_pages(3 * MIB, like=LIKE).fill_(3)
    assert (view == 1).all() and (second == 2).all() and (third == 3).all()


@plain_process
def test_what_is_freed_is_used_again_and_no_more_is_kept_than_was_in_use():
    """In a process of its own, where nothing else has memory waiting."""
    subprocess.run([sys.executable, "-c", REUSE], check=True)


REUSE = """
import torch
from fused_transformer.kernels.memory import empty_pages

def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096 // 2**20

like, pages = torch.zeros(1), 2**18  # floats of a MiB
empty_pages(pages, like=like)
start = mapped()
one = empty_pages(96 * pages, like=like)
address = one.data_ptr()
del one
one = empty_pages(90 * pages, like=like)  # a little less: the same memory
assert one.data_ptr() == address, (one.data_ptr(), address)
del one
for size in (2, 3, 200, 5, 190, 64, 100):  # each alone: never more than the largest, with its slack of a quarter
    memory = empty_pages(size * pages, like=like).fill_(size)
    assert (memory == size).all()
    del memory
assert mapped() - start <= 250 + 8, (start, mapped())
"""


def test_small_tensors_and_other_devices_have_memory_of_their_own():
    assert empty_pages(3, like=LIKE.to("meta")).device.type == "meta"
    assert empty_pages(MIB, like=LIKE.to("meta")).device.type == "meta"
    small = empty_pages(LEAST_BYTES // 4 - 1, like=LIKE)
    assert small.untyped_storage().nbytes() == LEAST_BYTES - 4
