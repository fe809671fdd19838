"""Caches of keys and values: the memory they lie in, and one sequence after another out of many."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import decode_attention, use_backend
from fused_transformer.kernels.decode_attention import new_cache
from tests.oracle import assert_equal


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 4, 64), (5, 1 << 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_cache_keeps_what_is_written_beside_other_memory(shape, dtype):
    before, after = torch.arange(1 << 20), torch.arange(1 << 20)
    cache = new_cache(*shape, like=torch.zeros(1, dtype=dtype))
    assert cache.shape == shape and cache.dtype == dtype and cache.device.type == "cpu"
    cache.copy_(torch.arange(cache.numel()).remainder(113).view(shape))
    assert_equal(cache, torch.arange(cache.numel()).remainder(113).view(shape).to(dtype))
    assert_equal(before, torch.arange(1 << 20))
    assert_equal(after, torch.arange(1 << 20))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_of_many_sequences_reads_its_own_keys(threads):
    """Each prepares the next one's keys, which may be none, one block or several; alone it must be the same."""
    lengths = torch.tensor([0, 0, 5, 64, 0, 65, 1, 130, 300, 0, 257, 64, 63, 0, 2, 256, 128, 7, 0])
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(lengths), 4, 1, 64, generator=generator)
    k, v = torch.randn(2, len(lengths), 2, 300, 64, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"):
            together = decode_attention(q, k, v, lengths)
            alone = [decode_attention(*(x[i : i + 1] for x in (q, k, v, lengths))) for i in range(len(lengths))]
            short = decode_attention(q, k[:, :, :200], v[:, :, :200], lengths.clamp(max=200))
            each = [
                decode_attention(*(x[i : i + 1] for x in (q, k[:, :, :200], v[:, :, :200], lengths.clamp(max=200))))
                for i in range(len(lengths))
            ]
    finally:
        torch.set_num_threads(before)
    assert_equal(together, torch.cat(alone))
    assert_equal(short, torch.cat(each))
    assert not together[lengths == 0].any() and together[lengths > 0].isfinite().all()
