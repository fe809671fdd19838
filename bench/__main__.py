"""python -m bench [--device cuda] [-k WORD] [--row-seconds S] [any pytest option]: run the benchmarks.

A whole run writes bench/results/<processor>_<date>.json; a run with -k or a file named only prints its table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    options = ["--rootdir", str(HERE.parent), "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-v"]
    options += [
        "-o",
        "python_files=bench_*.py",
        "-o",
        "python_functions=bench_*",
        "-o",
        "filterwarnings=ignore::DeprecationWarning",
    ]
    options += ["--benchmark-quiet", "--benchmark-disable-gc"]
    some = [word for word in arguments if word == "-k" or ".py" in word]
    if not some:
        options += ["--results", str(HERE / "results")]
    if not any(".py" in word for word in arguments):
        options.append(str(HERE))
    return int(pytest.main([*options, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
