"""Runs tests of the emulated CUDA kernels under the sanitizers.

    python -m tests.csrc.sanitized asan                 every op test of the CUDA backends, at addresses' and bits' cost
    python -m tests.csrc.sanitized tsan                 the calls of tests/csrc/calls.py: a data race fails
    python -m tests.csrc.sanitized tsan -k layer_norm   more arguments are pytest's

The kernels alone are instrumented. The sanitizer's library must come first in the process, so this starts another one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.csrc import building

LIBRARIES = {"plain": (), "asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",)}
OPTIONS = {
    "plain": {},
    # CPython frees little at exit, and kernels allocate nothing.
    "asan": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # What torch and Python do among themselves is not looked at, nor torch's threads, whose pool TSan does not know.
    "tsan": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1", "OMP_NUM_THREADS": "1"},
}
TESTS = {
    "plain": ["tests/csrc/test_schedules.py"],
    "asan": ["tests/csrc/test_emulator.py", "tests/csrc/test_schedules.py", "tests/kernels"],
    "tsan": ["tests/csrc/test_emulator.py", "tests/csrc/test_schedules.py"],
}


def library_path(name: str) -> str:
    command = [*building.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def command_and_environment(mode: str, arguments: Sequence[str]) -> tuple[list[str], Mapping[str, str]]:
    """What runs pytest with these arguments where the emulated kernels are built in `mode`."""
    environment = {**os.environ, **OPTIONS[mode], "FUSED_TRANSFORMER_EMULATED": mode, "PYTHONHASHSEED": "0"}
    if LIBRARIES[mode]:
        environment["LD_PRELOAD"] = " ".join(library_path(name) for name in LIBRARIES[mode])
    # -s: a sanitizer's report is written by a process that ends at once, past what pytest would have shown
    return [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments], environment


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in LIBRARIES:
        raise SystemExit(__doc__)
    mode, *rest = arguments
    command, environment = command_and_environment(mode, ["-m", "emulated and not gpu", *TESTS[mode], *rest])
    return subprocess.run(command, env=environment, cwd=building.ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
