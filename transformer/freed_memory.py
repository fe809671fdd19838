"""Memory of freed tensors, kept for those to come."""

from __future__ import annotations

import ctypes
import os

# glibc's malloc.h. Both are int, so larger blocks than the most of one come from the system as ever.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MOST = -1, -3, 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep the memory of freed CPU tensors of up to 2 GB. For a program to call once.

    glibc has a block beyond 32 MB from the system each time, and gives it back when it is freed; the system clears the
    next one's pages as they are touched. On a Zen 3 that is 20 ms for a result of 32 MB: bias and ReLU of 4096 x 2048
    takes 21 ms, and 3 after this call; a training step with a vocabulary of 32,000 a tenth less. What the process has
    had at most it keeps, and memory of other threads than the main one is given back as before. `python -m
    fused_transformer train` calls this where it trains on a CPU.

    Returns:
        Whether it is so now. False, and nothing changed: the C library is not glibc, or the environment tells its
        malloc what to do (MALLOC_..._, GLIBC_TUNABLES).

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    told = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, MOST)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
