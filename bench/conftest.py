"""The harness of the benchmarks. A benchmark is a function bench_<what>(compare) that describes one piece of work:

    @pytest.mark.parametrize("shape", EMBEDDING, ids=str)
    def bench_embedding(compare, shape, device):
        tokens, table = ...
        compare(
            {"naive": lambda tokens, table: ..., "compile": compiled(...), "fused": embedding},
            (tokens, table),
            bytes_moved=...,          # least bytes that must be read and written, or flops=..., or tokens=...
            peaks={"fused": ...},     # bytes held at most (tests/memory.py), where memory is what the row is about
        )

`compare` calls every implementation with the same arguments, asserts that they agree (with tests/oracle.py; exact is
"naive" in float64) and then times them in interleaved rounds: each round calls
each once. A result is a tensor, a tuple or a dict of tensors. `forward_backward(function)` (bench/agreement.py) is
the forward and backward pass of a function as such an implementation; args that need gradients require them.
Baselines may refuse (RuntimeError): the row says why. A row's group is its function's name, its name the pytest id.

At the end: a table of ratios; with --results DIR also DIR/<processor>_<date>.json for bench/report.py.
Where the work has no float64 twin, pass exact=callable(*args), or check=callable(results) to judge all yourself.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from bench import machine, report
from bench.agreement import agree
from bench.timing import Interleaved, Stamp, copy_gigabytes_per_second, matmul_gigaflops_per_second, quantiles

ROWS = pytest.StashKey[list]()
RESULTS = pytest.StashKey[Path]()
STRAY_ROUNDS = 2  # rounds before the first that counts: they also say how long a round takes


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    group.addoption("--results", type=Path, help="write the results as JSON into this folder")
    group.addoption("--row-seconds", type=float, default=3.0, help="time one row about this long (default: 3)")


def pytest_configure(config):
    config.stash[ROWS] = []
    Stamp.device = config.getoption("--device")
    if Stamp.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=Stamp))


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def compare(benchmark, request):
    torch.manual_seed(0)
    group = request.function.__name__.removeprefix("bench_").replace("_", " ")
    name = request.node.callspec.id if hasattr(request.node, "callspec") else group

    def run(
        implementations,
        args=(),
        *,
        bytes_moved=None,
        flops=None,
        tokens=None,
        peaks=None,
        exact=None,
        check=None,
        ours="fused",
    ):
        row = {"group": group, "name": name, "ours": ours, "refused": {}, "dtype": _dtype(args)}
        implementations = dict(implementations)
        backends = agree(implementations, args, exact, check, ours, row["refused"])
        row["backends"] = sorted(backends)
        if benchmark.disabled:  # --benchmark-disable: every row is checked, nothing is timed and nothing recorded
            benchmark.pedantic(lambda: None)
            return
        own = implementations.pop(ours)
        others = Interleaved(implementations, args)
        rounds = _rounds(own, others, request.config.getoption("--row-seconds"))
        gc.collect()

        def call_and_drop():
            own(*args)

        benchmark.group = group
        benchmark.pedantic(call_and_drop, setup=others.round, rounds=rounds)
        times = {ours: list(benchmark.stats.stats.data), **others.times}
        row["times"] = {label: quantiles(measured) for label, measured in times.items()}
        if peaks is not None:
            row["peak_bytes"] = peaks
        row |= _rates(row["times"][ours]["median_us"], bytes_moved, flops, tokens, row["dtype"])
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return run


def _rounds(own, others: Interleaved, row_seconds: float) -> int:
    stray = Interleaved({"own": own, **others.implementations}, others.args)
    for _ in range(STRAY_ROUNDS):
        stray.round()
    one_round = sum(times[-1] for times in stray.times.values())
    return max(5, min(200, int(row_seconds / one_round)))


def _rates(median_us: float, bytes_moved, flops, tokens, dtype: str) -> dict:
    rates = {}
    if bytes_moved is not None:
        rates["gb_per_s"] = round(bytes_moved / median_us / 1e3, 2)
        rates["share_of_copy"] = round(rates["gb_per_s"] / copy_gigabytes_per_second(), 3)
    if flops is not None:
        rates["gflop_per_s"] = round(flops / median_us / 1e3, 1)
        roofline = matmul_gigaflops_per_second(getattr(torch, dtype))
        rates["share_of_matmul"] = round(rates["gflop_per_s"] / roofline, 3)
    if tokens is not None:
        rates["tokens_per_s"] = round(tokens / median_us * 1e6)
    return rates


def _dtype(args) -> str:
    floats = [x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return str(floats[0] if floats else torch.float32).removeprefix("torch.")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine.facts())


def pytest_sessionfinish(session, exitstatus):
    rows, folder = session.config.stash[ROWS], session.config.getoption("--results")
    if rows and folder and exitstatus == pytest.ExitCode.OK:
        session.config.stash[RESULTS] = report.write_results(folder, machine.facts(), rooflines(rows), rows)


def rooflines(rows) -> dict:
    dtypes = sorted({row["dtype"] for row in rows if "gflop_per_s" in row})
    matmul = {dtype: matmul_gigaflops_per_second(getattr(torch, dtype)) for dtype in dtypes}
    return {"copy_gb_per_s": copy_gigabytes_per_second(), "matmul_gflop_per_s": matmul}


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("times and ratios")
    for line in report.text_table(machine.facts(), rooflines(rows), rows):
        terminalreporter.write_line(line)
    if RESULTS in config.stash:
        terminalreporter.write_line(f"\nwritten to {config.stash[RESULTS]}")
    elif config.getoption("--results"):
        terminalreporter.write_line("\nnot written: a row failed, and results with a row missing would mislead")
