"""Clocks, interleaved rounds, and the rooflines that a row is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from fused_transformer.kernels import matmul


class Stamp:
    """A moment on the device: later - earlier is seconds. CUDA events where the device is a GPU."""

    device = "cpu"

    def __init__(self):
        if Stamp.device == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.time = time.perf_counter()

    def __sub__(self, earlier: Stamp) -> float:
        if Stamp.device == "cuda":
            self.event.synchronize()
            return earlier.event.elapsed_time(self.event) / 1e3
        return self.time - earlier.time


@dataclass(frozen=True)
class Within:
    """An implementation that runs inside a context, entered outside of the timed stretch."""

    context: Callable[[], AbstractContextManager]
    function: Callable

    def __call__(self, *args):
        return self.function(*args)


def context_of(implementation: Callable) -> AbstractContextManager:
    return implementation.context() if isinstance(implementation, Within) else nullcontext()


def cold_caches() -> None:
    """On a GPU: overwrite L2, queued just ahead of the first event, so that it also hides the launch. CPU: nothing."""
    if Stamp.device == "cuda":
        _l2_filler().zero_()


@cache
def _l2_filler() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def seconds(implementation: Callable, args: tuple) -> float:
    """One call, its result dropped."""
    with context_of(implementation):
        cold_caches()
        start = Stamp()
        implementation(*args)
        return Stamp() - start


def in_turn(names: Iterable[str], round_number: int) -> list[str]:
    """In an order that rotates from round to round."""
    listed = list(names)
    turn = round_number % max(len(listed), 1)
    return listed[turn:] + listed[:turn]


class Interleaved:
    """Times one call of each implementation a round, in an order that rotates from round to round."""

    def __init__(self, implementations: dict[str, Callable], args: tuple):
        self.implementations, self.args = implementations, args
        self.times: dict[str, list[float]] = {name: [] for name in implementations}
        self._round = 0

    def round(self) -> None:
        for name in in_turn(self.implementations, self._round):
            self.times[name].append(seconds(self.implementations[name], self.args))
        self._round += 1


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, p20 and p80 in microseconds, and how many rounds they rest on."""
    ordered = sorted(times)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return round((ordered[low] + (ordered[high] - ordered[low]) * (place - low)) * 1e6, 2)

    return {"median_us": at(0.5), "p20_us": at(0.2), "p80_us": at(0.8), "rounds": len(ordered)}


@cache
def copy_gigabytes_per_second() -> float:
    """Bytes read and written per second by a copy that no cache holds: the roofline of work bound by memory."""
    count = 2**30 if Stamp.device == "cuda" else 2**27
    source = torch.ones(count // 4, device=Stamp.device)
    target = torch.empty_like(source)
    times = [seconds(target.copy_, (source,)) for _ in range(12)]
    return round(2 * count / quantiles(times[2:])["median_us"] / 1e3, 2)


def matmul_gigaflops_per_second(dtype: torch.dtype) -> float:
    """Multiply-adds (two operations each) per second of a large matrix product: the roofline of work bound by them.

    Where float32 is quicker than a 16-bit type (a processor without such instructions) it is float32's: a kernel may
    convert. And where this package's own float32 product is quicker than torch's it is that.
    """
    if dtype != torch.float32 and Stamp.device == "cpu":
        return max(_matmul_gigaflops(dtype), _matmul_gigaflops(torch.float32))
    return _matmul_gigaflops(dtype)


@cache
def _matmul_gigaflops(dtype: torch.dtype) -> float:
    n = 8192 if Stamp.device == "cuda" else 1024
    a = torch.randn(n, n, device=Stamp.device).to(dtype)
    b = torch.randn(n, n, device=Stamp.device).to(dtype)
    own = dtype in matmul.QUICKER and Stamp.device == "cpu"
    products = [matmul.product] if own else []
    # In 16 bits torch's own loops would take a hundred times as long.
    if not own or dtype == torch.float32 or matmul.onednn_multiplies(dtype):
        products.append(torch.mm)
    medians = [quantiles([seconds(product, (a, b)) for _ in range(12)][2:])["median_us"] for product in products]
    return round(2 * n**3 / min(medians) / 1e3, 1)
