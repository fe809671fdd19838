"""On a GPU: what a call costs the device, and what it costs the host, apart.

Between two events both count: where the host needs longer to launch than the device to compute, the host is what is
timed. A CUDA graph of the call, replayed, is the device alone; the time until the call returns, with an idle device,
is the host alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from bench.timing import Stamp, cold_caches, context_of

WARM_UPS, REPLAYS, CALLS = 3, 11, 11


def apart(implementations: dict[str, Callable], args: tuple) -> dict[str, dict[str, float]]:
    """{"graph_us": ..., "host_us": ...}, medians by label; the first without those that no graph can capture."""
    graphs: dict[str, float] = {}
    hosts: dict[str, float] = {}
    for label, implementation in implementations.items():
        with context_of(implementation):
            hosts[label] = _host(implementation, args)
            captured = _graph(implementation, args)
        if captured is not None:
            graphs[label] = captured
    return {"graph_us": graphs, "host_us": hosts}


def _host(implementation: Callable, args: tuple) -> float:
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        implementation(*args)
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(1e6 * median(times), 2)


def _graph(implementation: Callable, args: tuple) -> float | None:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a capture wants its library handles made, on a stream of its own
            for _ in range(WARM_UPS):
                implementation(*args)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            implementation(*args)
    except RuntimeError:  # it waits for the device, or asks the driver for memory
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(REPLAYS):
        cold_caches()
        start = Stamp()
        graph.replay()
        times.append(Stamp() - start)
    return round(1e6 * median(times), 2)
