"""Curves: how time or memory grows with one size while the rest stays, and with which power of it.

    def bench_scaling_add_layer_norm_rows(grow):
        def work(rows):
            return {"naive": ..., "fused": ...}, (x, residual, weight, bias)

        grow("add layer norm", "rows", [64, 128, ...], work, fixed="E512 float32")

`grow` asks `work` for implementations and arguments at each size; an implementation that is missing at a size (it would
need too much memory, or minutes) has no point there. All of a point do the same work, and must agree, as far as float32
promises, with ours. Then they are timed in interleaved rounds, or with of="bytes" their memory is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from bench import peers
from bench.agreement import detached
from bench.timing import Interleaved, context_of, quantiles
from tests.memory import peak_bytes

CURVES = pytest.StashKey[list]()
POINTS_OF_QUICK = {"time": 5, "bytes": 4}  # the smallest ones
LONGEST_ROUNDS = 50
SHORTEST_ROUNDS = 3
Work = Callable[[int], tuple[dict[str, Callable], tuple]]


def slope(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The power of the size that values grow with: least squares through the logarithms, over the larger half of the
    sizes, where what does not grow (a launch, a thread's start) counts least. None with fewer than two points.
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y]
    points = sorted(points)[-max(2, (len(points) + 1) // 2) :]
    if len(points) < 2:
        return None
    middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return round(sum((x - middle_x) * (y - middle_y) for x, y in points) / spread, 2)


def curve(name: str, along: str, sizes: Sequence[int], values: dict[str, list], *, fixed: str, of: str) -> dict:
    """As it stands in the JSON. Times are in microseconds; `slopes` are of every implementation."""
    slopes = {label: slope(sizes, of_label) for label, of_label in values.items()}
    return {
        "name": name,
        "along": along,
        "fixed": fixed,
        "unit": "µs" if of == "time" else "bytes",
        "ours": "fused",
        "sizes": list(sizes),
        "values": values,
        "slopes": slopes,
    }


@pytest.fixture
def grow(request, device):
    config = request.config
    quick, asked = config.getoption("--quick"), config.getoption("--peers")
    torch.manual_seed(0)

    def run(name: str, along: str, sizes: Sequence[int], work: Work, *, fixed: str, of: str = "time") -> dict:
        checked_alone = config.getoption("benchmark_disable")
        sizes = sizes[: 2 if checked_alone else POINTS_OF_QUICK[of] if quick else len(sizes)]
        values: dict[str, list[float | None]] = {}
        for place, size in enumerate(sizes):
            implementations, args = work(size)
            implementations = {
                x: f for x, f in implementations.items() if x == "fused" or peers.wanted(x, asked, quick)
            }
            _agree(implementations, args)
            measure = (
                partial(_times, seconds=_point_seconds(config)) if of == "time" else partial(_peaks, device=device)
            )
            for label, value in measure(implementations, args).items():
                values.setdefault(label, [None] * place).append(value)
            for of_label in values.values():
                of_label += [None] * (place + 1 - len(of_label))
            if device == "cuda":
                torch.cuda.empty_cache()  # the largest tensors come next
        made = curve(name, along, sizes, values, fixed=fixed, of=of)
        if not checked_alone:
            config.stash[CURVES].append(made)
        return made

    return run


def _point_seconds(config) -> float:
    """A curve has many points: each gets a sixth of what a row gets."""
    row = config.getoption("--row-seconds")
    usual = (0.3 if config.getoption("--quick") else 2.5) / (10 if config.getoption("--device") == "cuda" else 1)
    return (row if row is not None else usual) / 6


def _agree(implementations: dict[str, Callable], args: tuple) -> None:
    def result(implementation: Callable) -> tuple[torch.Tensor, ...]:
        with context_of(implementation):
            got = detached(implementation(*args))
        return got if isinstance(got, tuple) else (got,)

    ours = result(implementations["fused"])
    for label, implementation in implementations.items():
        for got, own in zip(result(implementation), ours, strict=True):
            within = 1e-3 if own.dtype in (torch.float32, torch.int64) else 3e-2
            torch.testing.assert_close(
                got, own, rtol=within, atol=within, msg=lambda text, label=label: f"{label}: {text}"
            )


def _times(implementations: dict[str, Callable], args: tuple, *, seconds: float) -> dict[str, float]:
    timer = Interleaved(implementations, args)
    timer.round()  # they ran once already: this says how long a round takes
    first = {label: times.pop() for label, times in timer.times.items()}
    for _ in range(max(SHORTEST_ROUNDS, min(LONGEST_ROUNDS, int(seconds / sum(first.values()))))):
        timer.round()
    return {label: quantiles(times)["median_us"] for label, times in timer.times.items()}


def _peaks(implementations: dict[str, Callable], args: tuple, *, device: str) -> dict[str, float]:
    def peak(implementation: Callable) -> int:
        with context_of(implementation):
            return peak_bytes(lambda: implementation(*args), device)

    return {label: peak(implementation) for label, implementation in implementations.items()}
