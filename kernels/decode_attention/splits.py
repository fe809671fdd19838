"""How the GPU backends split the keys of a head over blocks.

By the cache's capacity alone: the lengths are on the device, and a sequence's bits must not depend on the batch.
"""

from __future__ import annotations

# (up to this capacity, keys of a split). Up to 512 one split: a second launch in place of a few blocks of keys. Then
# 256, which is 4 blocks of 64: a batch of 1 with 8 key heads has 128 programs at 4096 keys, about one a multiprocessor.
# Above 16,384 keys there are programs enough, and longer splits leave less to merge.
SPLITS = ((512, 512), (16_384, 256), (65_536, 512), (2**31, 1024))


def split_keys(capacity: int) -> int:
    """Keys of a split, for a cache with room for `capacity`."""
    return next(keys for up_to, keys in SPLITS if capacity <= up_to)
