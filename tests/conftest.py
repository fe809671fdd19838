"""What every test runs under.

- The seed comes from the test's id, so a test draws the same numbers alone, in any order and on any worker.
- Deterministic algorithms are on; with them torch.empty is filled with NaN (integers: the largest), so that a
  kernel that leaves an element unwritten can't pass.
- A test that takes the argument `device` runs on "cpu", and on "cuda" too where there is one (marked gpu, so
  `-m gpu` runs those alone and `-m "not gpu"` none of them).
- Without a GPU, Triton kernels run in Triton's interpreter, repaired as tests/interpreter.py says.
- Without a GPU, CUDA kernels are compiled by g++ and run on the CPU (tests/emulated.py): the backend "cuda" is named
  cuda-emulated then, and its tests are marked emulated.
- A kernel that broke the CUDA context (an illegal address) ends its process after the test that did it: every later
  test there would fail too, and say nothing. With pytest-xdist a new worker goes on with the rest.
- In the interpreter and the emulator, which take most of the time, a test of a 16-bit type runs in one of the two, by
  turns from case to case; with --both-16-bit-types, and on a GPU, in both.
- Skips are counted by reason at the end: a suite that skips everything must not look green.

Helpers: tests/oracle.py compares results, tests/inputs.py makes them. Import both as `from tests.oracle import ...`.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import zlib
from collections import Counter

# Read when libgomp loads, with torch. On busy cores threads that spin at a barrier make small tests 100 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests import emulated

# Read when triton is first imported, which is later: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    config.addinivalue_line("markers", "fuzz: random calls; python -m tests.fuzz draws them for as long as one wants")
    config.addinivalue_line("markers", "emulated: runs CUDA kernels on the CPU")
    config.addinivalue_line("markers", "every_isa(*ids): CPU kernels, here those with these ids; -m every_isa")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # Two threads even on a large machine: enough to go through the parallel code, and tests are small.
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests import interpreter

        interpreter.repair()
    emulated.install()


def pytest_make_parametrize_id(config, val, argname):
    return "cuda-emulated" if argname == "backend" and val == "cuda" and emulated.installed() else None


def pytest_addoption(parser):
    parser.addoption("--both-16-bit-types", action="store_true", help="in Triton's interpreter and the emulator too")


def pytest_itemcollected(item):  # ahead of -m
    if "cuda-emulated" in item.nodeid:
        item.add_marker(pytest.mark.emulated)


@pytest.hookimpl(trylast=True)  # after -k and -m, which may have chosen one of the two types
def pytest_collection_modifyitems(config, items):
    left_out = set()
    if config.option.markexpr == "every_isa":
        left_out = {item for item in items if not _runs_cpu_kernels(item)}
    elif not config.getoption("--both-16-bit-types"):
        left_out = _one_of_each_two(items)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    if hasattr(config, "workerinput"):
        _put_long_files_first(items)


def _put_long_files_first(items) -> None:
    """So that pytest-xdist, which gives files out whole, has nothing long left when one worker has nothing to do."""
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("fuzz")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


def _runs_cpu_kernels(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    ids = item.callspec.id.split("-") if parameters else []
    asked = item.get_closest_marker("every_isa").args
    on_cpu = parameters.get("backend", "cpu") == "cpu" and parameters.get("device", "cpu") == "cpu"
    return on_cpu and all(name in ids for name in asked)


def _one_of_each_two(items) -> set:
    """Of tests that differ by bfloat16 and float16 alone, where these are computed slowly, one."""
    pairs: dict[str, list] = {}
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or parameters.get("device", "cpu") != "cpu":
            continue
        slow = parameters.get("backend") in ("triton", "cuda") and not torch.cuda.is_available()
        if slow and parameters.get("dtype") in (torch.bfloat16, torch.float16):
            # By ids and not by values, whose text may hold an address: every worker must choose the same.
            ids = ["16" if part in ("bf16", "f16") else part for part in item.callspec.id.split("-")]
            pairs.setdefault("-".join([item.nodeid.partition("[")[0], *ids]), []).append(item)
    return {pair[zlib.crc32(same.encode()) % 2] for same, pair in pairs.items() if len(pair) == 2}


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        devices = ["cpu"]
        if torch.cuda.is_available() or metafunc.config.option.markexpr == "gpu":
            devices.append(pytest.param("cuda", marks=pytest.mark.gpu))
        metafunc.parametrize("device", devices)


@pytest.fixture(autouse=True)
def _seed_from_the_test_id(request):
    on_cuda = "device" in request.fixturenames and request.getfixturevalue("device") == "cuda"
    if on_cuda and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _end_with_a_broken_context(request.node.nodeid)


def _end_with_a_broken_context(test: str):
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"\n{test} broke the CUDA context: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{test} broke the CUDA context: {error}", returncode=1)


def pytest_terminal_summary(terminalreporter):
    reasons = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        longrepr = report.longrepr
        text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reasons[text.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skips by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:6d}  {reason}")
