"""python -m bench: this package beside what one would use instead, on this machine.

A whole run writes bench/results/<processor>_<date>.json; part of one (--quick, --op, --shape, --peers, -k or a file
named) prints its tables, and writes where --results says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import compare, peers, selection

HERE = Path(__file__).parent
PYTEST = (
    *("--rootdir", str(HERE.parent), "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-v"),
    *("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
    *("-o", "filterwarnings=ignore::DeprecationWarning"),
    *("--benchmark-quiet", "--benchmark-disable-gc"),
)


def parser() -> argparse.ArgumentParser:
    about, rest = (__doc__ or "").split("\n", 1)
    told = argparse.ArgumentParser(
        prog="python -m bench",
        allow_abbrev=False,
        description=about.partition(": ")[2] + rest,
        epilog="Any other option is pytest's: -k WORD, -x, --benchmark-disable (check every row and time none), ...",
    )

    told.add_argument("--quick", action="store_true", help="a shape or two of each group, under 2 minutes on 2 cores")
    told.add_argument(
        "--op", type=selection.names, metavar="NAME[,NAME]", help="these alone: attention, layer_norm, model, ..."
    )
    of_rows = "rows with WORD in their name: wmt, llama, bfloat16, ..."
    told.add_argument("--shape", type=selection.word, metavar="WORD", help=of_rows)
    of_peers = "these alternatives alone: sdpa, flex, ..."
    told.add_argument("--peers", type=selection.names, metavar="NAME[,NAME]", help=of_peers)
    both = "run nothing: what differs between two results; exit status 1 if something got slower or holds more memory"
    told.add_argument("--compare", type=Path, nargs=2, metavar=("OLD.json", "NEW.json"), help=both)
    told.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    told.add_argument("--results", type=Path, metavar="DIR", help="write JSON and pictures here")
    told.add_argument(
        "--row-seconds",
        type=selection.seconds,
        metavar="S",
        help="time one row about this long (2.5; quick: 0.3; GPU: 0.3, 0.1)",
    )
    return told


def pytest_arguments(arguments: Sequence[str]) -> list[str]:
    """What pytest is given. Names that there are none of end here, with those that there are."""
    told = parser()
    options, rest = told.parse_known_args(arguments)
    if options.op is not None and (refusal := selection.refusal_of_ops(options.op)):
        told.error(refusal)
    if options.peers is not None and (wrong := peers.unknown(options.peers)):
        known = ", ".join(peer.label for peer in peers.PEERS)
        told.error(f"--peers: no alternative is named {', '.join(wrong)}; known are {known}")
    made = [*PYTEST, "--device", options.device]
    if options.row_seconds is not None:
        made += ["--row-seconds", str(options.row_seconds)]
    made += ["--quick"] if options.quick else []
    made += ["--op", ",".join(options.op)] if options.op is not None else []
    made += ["--shape", options.shape] if options.shape else []
    made += ["--peers", ",".join(options.peers)] if options.peers is not None else []
    part = options.quick or options.op is not None or options.shape or options.peers is not None
    part = part or any(word.startswith("-k") or ".py" in word for word in rest)
    if options.results or not part:
        made += ["--results", str(options.results or HERE / "results")]
    if not any(".py" in word for word in rest):
        made.append(str(HERE))
    return [*made, *rest]


def main(arguments: Sequence[str]) -> int:
    both = parser().parse_known_args(arguments)[0].compare
    if both:
        return compare.main(*both)
    return int(pytest.main(pytest_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
