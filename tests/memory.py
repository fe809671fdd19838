"""How much memory a call holds at most, of torch's tensors."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from fused_transformer.kernels import memory


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """What torch has allocated at most while function() ran, beyond what it had before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    all_by_torch = mock.patch.object(memory, "LARGE_BYTES", 2**62)  # the profiler is told of no other memory
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with all_by_torch, torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
