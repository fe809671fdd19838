"""The harness of the benchmarks. A benchmark is a function bench_<what>(compare) that describes one piece of work:

    @pytest.mark.parametrize("shape", EMBEDDING, ids=str)
    def bench_embedding(compare, shape, device):
        tokens, table = ...
        compare(
            {"naive": lambda tokens, table: ..., "compile": compiled(...), "fused": embedding},
            (tokens, table),
            bytes_moved=..., flops=...,  # the least that must be read and written, and computed; or tokens=...
            peaks={"fused": ...},     # bytes held at most (tests/memory.py), where memory is what the row is about
        )

`compare` calls every implementation with the same arguments, asserts that they agree (with tests/oracle.py; exact is
"naive" in float64) and then times them in interleaved rounds: each round calls
each once. A result is a tensor, a tuple or a dict of tensors. `forward_backward(function)` (bench/agreement.py) is
the forward and backward pass of a function as such an implementation; args that need gradients require them.
Baselines may refuse (RuntimeError): the row says why. A row's group is its function's name, its name the pytest id.

Every label but ours is in bench/peers.py; which rows and labels run is chosen on the command line (bench/__main__.py).

At the end: a table of ratios; with --results DIR also DIR/<processor>_<date>.json for bench/report.py.
Where the work has no float64 twin, pass exact=callable(*args), or check=callable(results) to judge all yourself.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bench import backends, machine, peers, plots, report, selection
from bench.agreement import agree
from bench.apart import apart
from bench.growth import CURVES, grow  # noqa: F401  the fixture of curves
from bench.held import HELD, hold  # noqa: F401  the fixture of memory
from bench.timing import Interleaved, Stamp, copy_gigabytes_per_second, matmul_gigaflops_per_second, quantiles

ROWS = pytest.StashKey[list]()
WRITTEN = pytest.StashKey[list[Path]]()
INCOMPLETE = pytest.StashKey[Path]()
UNWRITTEN = pytest.StashKey[str]()
JUDGES = ("naive", "torch.nn", "unpacked")  # what others are compared with: they run, though they may not be timed


@dataclass(frozen=True)
class Pace:
    """How long a row is timed."""

    row_seconds: float
    stray_rounds: int  # before the first that counts: they also say how long a round takes
    least_rounds: int

    def rounds(self, one_round: float) -> int:
        """How many, if one takes so many seconds. Of what takes a row's time in one round there are three."""
        least = self.least_rounds if one_round < self.row_seconds else min(3, self.least_rounds)
        return max(least, min(200, int(self.row_seconds / one_round)))


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    group.addoption("--results", type=Path, help="write the results as JSON into this folder")
    about = "time one row about this long (default: 2.3, on a GPU 0.3; --quick: 0.3, 0.1)"
    group.addoption("--row-seconds", type=selection.seconds, help=about)
    group.addoption("--quick", action="store_true", help="the first shape of each group")
    group.addoption("--op", type=selection.names, help="files or benchmarks in them, by commas")
    group.addoption("--shape", type=selection.word, help="rows with this in their name")
    group.addoption("--peers", type=selection.names, help="alternatives that are timed, by commas")


def pace(config) -> Pace:
    quick = config.getoption("--quick")
    seconds = config.getoption("--row-seconds")
    if seconds is None:
        seconds = (0.1 if quick else 0.3) if Stamp.device == "cuda" else (0.3 if quick else 2.3)
    return Pace(seconds, 1 if quick else 2, 3 if quick else 5)


def pytest_configure(config):
    for key in (ROWS, CURVES, HELD):
        config.stash[key] = []
    Stamp.device = config.getoption("--device")
    if Stamp.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    measures = not (config.getoption("benchmark_disable") or config.option.collectonly)
    if measures and (folder := config.getoption("--results")) and (refusal := report.refusal_of_folder(folder)):
        raise pytest.UsageError(f"--results: {refusal}")


def pytest_collection_modifyitems(config, items):
    kept = list(items)
    if config.getoption("--op") is not None:
        kept = selection.named(kept, config.getoption("--op"))
    if word := config.getoption("--shape"):
        kept, among = selection.shaped(kept, word), kept
        if not kept:
            known = "; ".join(dict.fromkeys(map(selection.row_name, among)))
            raise pytest.UsageError(f"--shape: no row has {word!r} in its name; there are {known}")
    if config.getoption("--quick"):
        kept = selection.first_of_each(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=Stamp))


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def compare(benchmark, request, device):
    torch.manual_seed(0)
    group = request.function.__name__.removeprefix("bench_").replace("_", " ")
    name = selection.row_name(request.node)
    asked, quick = request.config.getoption("--peers"), request.config.getoption("--quick")

    def timed(label: str, ours: str) -> bool:
        return label == ours or label.startswith(f"{ours} ") or peers.wanted(label, asked, quick)

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
        dtype=None,
    ):
        row = {"group": group, "name": name, "ours": ours, "refused": {}, "dtype": dtype or _dtype(args)}
        implementations = {
            label: one for label, one in implementations.items() if label in JUDGES or timed(label, ours)
        }
        seen = agree(implementations, args, exact, check, ours, row["refused"])
        row["backends"] = sorted(seen)
        if forced := backends.others(implementations[ours], seen, ours, device):
            judged = {label: one for label, one in implementations.items() if label in (*JUDGES, ours)} | forced
            agree(judged, args, exact, check, ours, row["refused"])
            implementations |= {label: judged[label] for label in forced if label in judged}
        implementations = {label: one for label, one in implementations.items() if timed(label, ours)}
        if benchmark.disabled:  # --benchmark-disable: every row is checked, nothing is timed and nothing recorded
            benchmark.pedantic(lambda: None)
            return
        if device == "cuda" and args:  # what has no arguments is layers and models, with an optimizer or a loop within
            row |= apart(implementations, args)
        own = implementations.pop(ours)
        others = Interleaved(implementations, args)
        rounds = _rounds(own, others, pace(request.config))
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


def _rounds(own, others: Interleaved, pace: Pace) -> int:
    stray = Interleaved({"own": own, **others.implementations}, others.args)
    one_round = 0.0
    for _ in range(pace.stray_rounds):
        stray.round()
        one_round = sum(times[-1] for times in stray.times.values())
        if one_round >= pace.row_seconds:  # all of it is warm by now, and another would tell no more
            break
    return pace.rounds(one_round)


def _rates(median_us: float, bytes_moved, flops, tokens, dtype: str) -> dict:
    """What ours moves and computes a second, and its share of each limit."""
    rates = {"bytes": bytes_moved, "flops": flops} if bytes_moved and flops else {}
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
    results, folder = measured(session.config), session.config.getoption("--results")
    if not results or not folder:
        return
    try:
        _write(session.config, folder, results, exitstatus)
    except OSError as error:  # a full disk, say: the summary says it, beside the table
        session.config.stash[UNWRITTEN] = str(error)
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED


def _write(config, folder: Path, results: dict, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK:
        path = report.write_results(folder, results)
        config.stash[WRITTEN] = [path]
        config.stash[WRITTEN] += plots.write(results, path)
    elif exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        config.stash[INCOMPLETE] = report.write_results(folder, results, complete=False)


def measured(config) -> dict | None:
    """All that the run has measured, if anything."""
    rows, curves, held = (config.stash[key] for key in (ROWS, CURVES, HELD))
    return report.results_of(machine.facts(), rooflines(rows), rows, curves, held) if rows or curves or held else None


def rooflines(rows) -> dict:
    dtypes = sorted({row["dtype"] for row in rows if "gflop_per_s" in row})
    matmul = {dtype: matmul_gigaflops_per_second(getattr(torch, dtype)) for dtype in dtypes}
    return {"copy_gb_per_s": copy_gigabytes_per_second(), "matmul_gflop_per_s": matmul}


def pytest_terminal_summary(terminalreporter, config):
    results = measured(config)
    if not results:
        return
    terminalreporter.section("times and ratios")
    for line in report.text_table(results):
        terminalreporter.write_line(line)
    terminalreporter.write_line("")
    for line in peers.absent(config.getoption("--device"), config.getoption("--peers")):
        terminalreporter.write_line(line)
    if WRITTEN in config.stash:
        terminalreporter.write_line("\nwritten: " + ", ".join(map(str, config.stash[WRITTEN])))
    elif INCOMPLETE in config.stash:
        path = config.stash[INCOMPLETE]
        terminalreporter.write_line(f"\nnot all rows were measured: what was is in {path}, which no table is made of")
    elif config.getoption("--results") and UNWRITTEN not in config.stash:
        terminalreporter.write_line("\nnot written: the run broke off")
    if UNWRITTEN in config.stash:
        what, left = "results", "the tables above are all there is of this run"
        if WRITTEN in config.stash:
            what, left = "pictures", "python -m bench.plots draws them anew"
        terminalreporter.write_line(f"\nERROR: the {what} can't be written: {config.stash[UNWRITTEN]}; {left}")
