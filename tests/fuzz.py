"""Random calls of the ops: a few in every test run, the same ones each time; as many as there is time for on demand.

    python -m tests.fuzz [--minutes 30] [--seed 0] [--backend cpu] [--op attention] [any pytest option]

shares the minutes among the ops. The calls of round i are drawn from seed + i; what fails is reduced by hypothesis to
a simple call, and printed with the line that repeats its round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tests.oracle import assert_backend_matches, assert_matches

SECONDS, SEED = "FUSED_TRANSFORMER_FUZZ_SECONDS", "FUSED_TRANSFORMER_FUZZ_SEED"
ROUND = 50  # calls that are drawn from one seed
# What the names of a backend's tests have, on a machine without a GPU, where "cpu" is the device too.
NAMED = {"cpu": "cpu and not triton and not emulated", "triton": "triton", "cuda": "emulated"}
PLAIN = {"deadline": None, "database": None, "print_blob": False, "suppress_health_check": list(HealthCheck)}


def run(calls: SearchStrategy, check: Callable[[dict], None], examples: int) -> int:
    """check(call) for `examples` calls, always the same; or in rounds for so many seconds, if the environment says so.

    Returns how many rounds there were.
    """
    limit = os.environ.get(SECONDS)
    if limit is None:
        settings(max_examples=examples, derandomize=True, **PLAIN)(given(calls)(check))()
        return 0
    stop, first, rounds = time.monotonic() + float(limit), int(os.environ.get(SEED, "0")), 0
    while rounds == 0 or time.monotonic() < stop:

        @seed(first + rounds)
        @settings(max_examples=ROUND, **PLAIN)
        @given(calls)
        def one_round(call):
            check(call)

        try:
            one_round()
        except Exception:
            _say(f"to repeat it: {SEED}={first + rounds} {SECONDS}=0 python -m pytest '{_test()}'")
            raise
        rounds += 1
    _say(f"{_test()}: {rounds} rounds of {ROUND} calls, seeds {first} to {first + rounds - 1}")
    return rounds


def _say(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


# Of a random call; one that somebody chose is held to the defaults of `assert_matches`. Among the many calls of half an
# hour there are some for which plain torch happens to be right to the last bit: with 3 and 4 one in thousands failed.
BOUND = {"factor": 4.0, "ulps": 8.0}
# A rounding of 1. A log-sum-exp, or a loss that is one less a logit, may come out far smaller than its parts, which
# cancel, and then has their error.
LOGARITHM = 2.0**-23
# Of float64's 1 + erf(x): GELU of -9 is -1e-18, and 0 by that.
TINY = 1e-14


def _farther(naive: Tensor, exact: Tensor, by: float) -> Tensor:
    """naive, its difference from exact larger by so much, to whichever side it is: a step to one could undo it."""
    return naive + torch.where(naive < exact, -by, by).to(naive.dtype)


def loosened(naive: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """naive, its gradients moved by 16 eps of the largest number of the call.

    Random calls hold gradients that cancel: a query that sees one key has dS = P (dP - delta) = 0 in exact arithmetic,
    and what is left is the rounding of dP and delta, summed over the queries for a bias, which has nothing to do with
    the size of the gradient.
    """
    largest = max(float(x.abs().nan_to_num(0, 0, 0).max()) if x.numel() else 0.0 for x in exact.values())
    return {
        name: _farther(x, exact[name], 16 * torch.finfo(x.dtype).eps * largest) if name.startswith("d") else x
        for name, x in naive.items()
    }


def assert_call_matches(
    function: Callable, backend: str, tensors: dict, *, logarithm: str | None = None, **options
) -> None:
    """The oracle of one random call: outputs and gradients. logarithm: the result that is a loss or an lse."""
    floats = [x for x in tensors.values() if x is not None and x.is_floating_point() and x.numel()]
    parts = max([1.0, *(float(x.detach().nan_to_num(0, 0, 0).abs().max()) for x in floats)])

    def judge(got, exact, naive):
        naive = {name: _farther(x, exact[name], TINY) for name, x in loosened(naive, exact).items()}
        if logarithm is not None:
            naive[logarithm] = _farther(naive[logarithm], exact[logarithm], LOGARITHM * parts)
        assert_matches(got, exact, naive, **BOUND)

    assert_backend_matches(function, backend, tensors, judge=judge, **options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cpu", choices=NAMED, help="default: %(default)s")
    parser.add_argument("--op", default="", help="part of a test's name (default: all ops)")
    options, rest = parser.parse_known_args(arguments)
    chosen = f"{NAMED[options.backend]} and {options.op}" if options.op else NAMED[options.backend]
    command = [sys.executable, "-m", "pytest", "-m", "fuzz", "-k", chosen, "-p", "no:cacheprovider", *rest]
    root = Path(__file__).parents[1]
    listed = subprocess.run(
        [*command, "--collect-only", "-q"], cwd=root, check=False, capture_output=True, text=True
    ).stdout
    count = sum("::" in line for line in listed.splitlines())
    if count == 0:
        parser.error(f"no fuzz test is of {chosen}")
    environment = {**os.environ, SECONDS: f"{60 * options.minutes / count:.1f}", SEED: str(options.seed)}
    return subprocess.run([*command, "-v", "-s", "--tb=short"], cwd=root, check=False, env=environment).returncode


fuzz = pytest.mark.fuzz

if __name__ == "__main__":
    sys.exit(main())
