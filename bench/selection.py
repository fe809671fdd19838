"""Which rows a run has: --op, --shape, --quick. Names that no benchmark has are refused with those that there are.

What options may be (`names`, `word`, `seconds`) is the same for bench/__main__.py and for pytest itself.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SMALL = "transformer-small"


def names(text: str) -> list[str]:
    """Names by commas: at least one, since none would be a run of nothing, or beside nothing."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"must be names, by commas, got {text!r}")
    return found


def word(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a word out of the rows' names, got {text!r}")
    return text


def seconds(text: str) -> float:
    try:
        told = float(text)
    except ValueError:
        told = math.nan
    if not 0 < told < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return told


def groups(folder: Path = HERE) -> dict[str, list[str]]:
    """The benchmarks of each file, by names without bench_: {"layer_norm": ["add_layer_norm", ...], ...}."""
    files = sorted(folder.glob("bench_*.py"))
    return {
        path.stem.removeprefix("bench_"): re.findall(r"^def bench_(\w+)", path.read_text(), re.MULTILINE)
        for path in files
    }


def refusal_of_ops(ops: Iterable[str]) -> str | None:
    """None, or the sentence for names that are neither a file nor a benchmark in it."""
    known = groups()
    benchmarks = {name for names in known.values() for name in names}
    wrong = [op for op in ops if op not in known and op not in benchmarks]
    if not wrong:
        return None
    others = sorted(benchmarks - set(known))
    return (
        f"--op: no benchmark is named {', '.join(wrong)}; known are {', '.join(known)}, "
        f"and single groups of them: {', '.join(others)}"
    )


def named(items: Sequence, ops: Sequence[str]) -> list:
    """The rows of pytest that belong to one of `ops`, a file or a benchmark in it."""

    def belongs(item) -> bool:
        return bool({item.path.stem.removeprefix("bench_"), benchmark_of(item)} & set(ops))

    return [item for item in items if belongs(item)]


def shaped(items: Sequence, word: str) -> list:
    """The rows with `word` in their name, capitals or not."""
    return [item for item in items if word.lower() in row_name(item).lower()]


def first_of_each(items: Sequence) -> list:
    """One shape of every benchmark, for each of its other parameters (a mask, forward or training): the small model's
    where it has that, else the first.
    """
    chosen: dict[Hashable, object] = {}
    for item in items:
        others = {name: str(value) for name, value in parameters(item).items() if name != "shape"}
        key = (item.path, benchmark_of(item), tuple(sorted(others.items())))
        if key not in chosen or (SMALL in row_name(item) and SMALL not in row_name(chosen[key])):
            chosen[key] = item
    return list(chosen.values())


def benchmark_of(item) -> str:
    return item.originalname.removeprefix("bench_")


def parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def row_name(item) -> str:
    """What the tables call the row."""
    return item.callspec.id if hasattr(item, "callspec") else benchmark_of(item).replace("_", " ")
