"""Memory: what each implementation of a piece of work holds at most, beyond what it was given.

    hold("add layer norm", "forward", {"naive": ..., "fused": ...}, (x, residual, weight, bias), shape)

Results count, since they are held when the work is done. What is measured is torch's allocations (tests/memory.py); the
native kernels allocate nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import peers
from bench.timing import context_of
from tests.memory import peak_bytes

HELD = pytest.StashKey[list]()


@pytest.fixture
def hold(request, device):
    config = request.config
    quick, asked = config.getoption("--quick"), config.getoption("--peers")
    torch.manual_seed(0)

    def run(name: str, what: str, implementations: dict[str, Callable], args: tuple, shape: object) -> dict[str, int]:
        peaks = {}
        for label, implementation in implementations.items():
            if label.partition(" ")[0] != "fused" and not peers.wanted(label, asked, quick):
                continue
            with context_of(implementation):
                implementation(*args)  # what a first call alone leaves behind is none of the work's
                peaks[label] = peak_bytes(lambda implementation=implementation: implementation(*args), device)
        if not config.getoption("benchmark_disable"):  # else everything is checked and nothing recorded
            config.stash[HELD].append(
                {"name": name, "what": what, "shape": str(shape), "ours": "fused", "peak_bytes": peaks}
            )
        return peaks

    return run
