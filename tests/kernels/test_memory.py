"""Memory that is used again: whose it is, and how much is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from fused_transformer.kernels import (
    add_layer_norm,
    attention,
    bias_act,
    cross_entropy,
    embedding,
    layer_norm,
    use_backend,
)
from fused_transformer.kernels.memory import LARGE_BYTES, LEAST_BYTES, empty_pages, empty_result, empty_result_like
from tests.inputs import threads
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


# ---------------------------------------------------------------- results of ops


@pytest.fixture
def as_it_lies(monkeypatch):
    """torch leaves what it allocates as it is; otherwise in these tests it fills it, and has all of it to itself."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def is_on_pages(x: torch.Tensor) -> bool:
    return not x.untyped_storage().resizable()


LARGE = torch.zeros(1030, 1025)
assert LARGE.nbytes >= LARGE_BYTES


@pytest.mark.usefixtures("as_it_lies")
@pytest.mark.parametrize("layout", ["rows", "columns", "heads", "every_second"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_large_result_is_as_torch_would_make_it(contiguous, layout):
    x = {
        "rows": LARGE,
        "columns": LARGE.t(),
        "heads": torch.zeros(2, 600, 8, 128).transpose(1, 2),
        "every_second": torch.zeros(1030, 2050)[:, ::2],
    }[layout]
    form = torch.contiguous_format if contiguous else torch.preserve_format
    for dtype in (None, torch.float64):
        wanted, got = (
            torch.empty_like(x, dtype=dtype, memory_format=form),
            empty_result_like(x, dtype, contiguous=contiguous),
        )
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert is_on_pages(got) and not got._is_view() and not got.requires_grad
    got = empty_result(*x.shape, like=x, dtype=torch.bfloat16)
    assert got.shape == x.shape and got.dtype == torch.bfloat16 and got.is_contiguous()


def test_torch_fills_large_results_where_it_was_told_to():
    for x in (empty_result_like(LARGE), empty_result(*LARGE.shape, like=LARGE)):
        assert x.isnan().all() and not is_on_pages(x)


@pytest.mark.usefixtures("as_it_lies")
def test_who_has_memory_of_their_own():
    class Own(torch.Tensor):
        pass

    for x in (LARGE[:100], LARGE.to("meta"), LARGE.as_subclass(Own)):
        assert not is_on_pages(empty_result_like(x)) and type(empty_result_like(x)) is type(x)
    assert is_on_pages(empty_result_like(torch.nn.Parameter(LARGE)))


def operations() -> dict:
    """Each op with large results and gradients: a tensor, and a function of it."""
    tokens, targets = torch.randint(0, 1030, (1100,)), torch.randint(0, 1025, (1030,))
    return {
        "bias_act": (torch.randn(1030, 1025), lambda x: bias_act(x, x.new_ones(1025), activation="gelu")),
        "layer_norm": (torch.randn(1030, 1025), lambda x: layer_norm(x)),
        "add_layer_norm": (torch.randn(1030, 1025), lambda x: add_layer_norm(x, x.detach() * 2)),
        "cross_entropy": (torch.randn(1030, 1025), lambda x: cross_entropy(x, targets, reduction="none")),
        "embedding": (torch.randn(1030, 1025), lambda x: embedding(tokens, x)),
        "attention": (torch.randn(2, 600, 8, 128), lambda x: attention(*(x.transpose(1, 2),) * 3)),
    }


@pytest.mark.usefixtures("as_it_lies")
@pytest.mark.parametrize("name", operations())
@pytest.mark.parametrize("way", ["direct", "long"])
def test_large_results_and_gradients_are_right_and_anybodys_to_write_to(way, name):
    x, function = operations()[name]

    def both(dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = function(leaf)
        y.backward(torch.ones_like(y))
        return y, leaf.grad

    with threads(2), use_backend("cpu") if way == "long" else nullcontext():
        y, grad = both(torch.float32)
        plain = function(x)
        again = function(x * 2)  # has other memory, as those are in use
    for got, wanted in zip((y, grad), both(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert_equal(plain, y.detach())
    if name != "cross_entropy":  # whose result is small
        assert all(map(is_on_pages, (plain, y, again)))
    if name != "attention":  # whose three gradients torch adds up
        assert is_on_pages(grad)
    before = plain.clone()
    plain += 1
    y += 1
    assert_equal([plain, y.detach()], [before + 1] * 2)
