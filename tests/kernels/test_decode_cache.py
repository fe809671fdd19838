"""Caches of keys and values of many sequences, one after another."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import decode_attention, use_backend
from tests.oracle import assert_equal


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
