"""keep_freed_memory: what is freed is there for the next tensor, and the environment's word counts for more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fused_transformer import keep_freed_memory

PAGES = 64 * 2**20 // 4096  # of a tensor of 64 MB
# Prints what the call says, and page faults of the third tensor of three, one after another.
PROGRAM = """
import resource, sys, torch
from fused_transformer import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1:] == ["keep"] else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults)
"""


def run(*arguments: str) -> tuple[str, int]:
    own = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    own["THP_MEM_ALLOC_ENABLE"] = "0"  # torch's huge pages would make few faults of many
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=own, check=True, capture_output=True, text=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc")
def test_a_freed_tensors_pages_are_the_next_ones():
    kept, faults = run("keep")
    assert kept == "True" and faults < PAGES / 16
    if run()[1] < PAGES / 2:
        pytest.skip("here pages are large, or freed memory is kept without it")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "1048576"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")],
)
def test_what_the_environment_says_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() is False


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(os, "confstr_names", {})
    assert keep_freed_memory() is False
