"""python -m bench.tune: times candidate tiles of attention's Triton kernels in bfloat16 on this GPU, for
kernels/attention/triton_config.py.

Each candidate is compiled first, several processes side by side (Triton keeps what they compile on disk), and then
timed alone in this one. A line is a kernel, a head width and a mask; behind it the candidates, fastest first. "own"
marks what the table has now. Tiles must not depend on batch or length, so a candidate is worth the line it takes if it
is faster at every length here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from fused_transformer.kernels import attention, use_backend
from fused_transformer.kernels.attention import triton as kernels
from fused_transformer.kernels.attention.triton_autotune import microseconds
from fused_transformer.kernels.attention.triton_config import Config, config

MASKS = {"unmasked": {}, "causal": {"causal": "top_left"}}
LENGTHS = (128, 2048)
TOKENS = 32768  # of a batch, whatever the length
WIDTH_OF_MODEL = 2048  # heads times their width


def candidates(kernel: str, width: int) -> Iterator[Config]:
    """Tiles whose operands can fit; what does not compile or has no room is left out when it is met."""
    for m, n, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        crowded, idle = m * n >= 128 * 128 and warps == 4, m * n < 64 * 128 and warps == 8
        flat = (kernel == "dkdv" and n < m) or (kernel != "dkdv" and m < n)
        if not (crowded or idle or flat):
            yield Config(m, n, warps, stages)


def lines() -> Iterator[tuple[str, int, str]]:
    yield from product(("forward", "dq", "dkdv"), (64, 128), MASKS)


def inputs(width: int, length: int) -> list[torch.Tensor]:
    shape = (TOKENS // length, WIDTH_OF_MODEL // width, length, width)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3)]


class Forced:
    """While it lasts, launches of `kernel` take `chosen`, and are timed if `timed`."""

    def __init__(self, kernel: str, chosen: Config, timed: bool):
        self.kernel, self.chosen, self.timed, self.microseconds = kernel, chosen, timed, float("inf")

    def __enter__(self) -> Forced:
        self.before = kernels.tiles_for
        kernels.tiles_for = self._tiles_for
        return self

    def __exit__(self, *_) -> None:
        kernels.tiles_for = self.before

    def _tiles_for(self, kernel, q, mask, dropout_p, launch) -> Config:
        if kernel != self.kernel:
            return config(kernel, q)
        if self.timed:
            self.microseconds = microseconds(self.chosen, launch)
        return self.chosen


def run(kernel: str, chosen: Config, mask: str, args: list[torch.Tensor], timed: bool) -> float:
    """Microseconds of one launch, infinite where it has no room."""
    from triton.runtime.errors import OutOfResources

    try:
        with use_backend("triton"), Forced(kernel, chosen, timed) as forced:
            out = attention(*args, **MASKS[mask])
            if kernel != "forward":
                torch.autograd.grad(out, args, out)
            torch.cuda.synchronize()
    except OutOfResources:
        return float("inf")
    except Exception as error:  # a candidate that Triton cannot compile is none
        print(f"{kernel} {chosen}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        return float("inf")
    return forced.microseconds


def compile_share(place: int, of: int) -> None:
    """Compiles every `of`-th candidate of all lines: one of the processes side by side."""
    every = [(line, chosen) for line in lines() for chosen in candidates(*line[:2])]
    for (kernel, width, mask), chosen in every[place::of]:
        run(kernel, chosen, mask, inputs(width, 128), timed=False)


def measure(line: tuple[str, int, str]) -> list[dict]:
    kernel, width, mask = line
    of_length = {length: inputs(width, length) for length in LENGTHS}
    own = config(kernel, of_length[LENGTHS[0]][0])
    measured = []
    for chosen in dict.fromkeys((own, *candidates(kernel, width))):
        times = [run(kernel, chosen, mask, args, timed=True) for args in of_length.values()]
        if times[0] < float("inf"):
            measured.append({"tiles": vars(chosen), "own": chosen == own, "microseconds": times})
    return sorted(measured, key=lambda one: one["microseconds"][-1])


def told(one: dict) -> str:
    tiles = "x".join(str(one["tiles"][name]) for name in ("m", "n", "warps", "stages", "registers"))
    return f"{tiles}{' (own)' if one['own'] else ''}: " + ", ".join(f"{time:.0f}" for time in one["microseconds"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--json", type=Path, help="write all of it here")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile (8)")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        compile_share(options.share, options.jobs)
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune for")
    shares = [
        [sys.executable, "-m", "bench.tune", f"--jobs={options.jobs}", f"--share={i}"] for i in range(options.jobs)
    ]
    for process in [subprocess.Popen(share) for share in shares]:
        process.wait()
    results = {}
    for line in lines():
        name = " ".join(map(str, line))
        results[name] = measure(line)
        print(
            f"{name}, µs at {', '.join(map(str, LENGTHS))} tokens: " + "; ".join(map(told, results[name][:6])),
            flush=True,
        )
        own = next((told(one) for one in results[name] if one["own"]), "own: no room")
        print(f"    {own}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
