"""--compare OLD.json NEW.json: which rows got slower or faster by more than what was noise when they were measured."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.report import is_ours

RULE = """\
A row is slower if the 20th percentile of its new times is above the 80th of its old ones, and faster if it is the other
way round, by more than {tolerance:.0%} and after the old times were moved as the machine moved: by the change of the
alternatives timed in the same rounds. They did not change, so what they took longer the machine took; where they, or
their 20th and 80th percentiles and medians, disagree, the row is judged by the one that excuses most. A row without
alternatives moves as the median row."""
TOLERANCE = 0.05
SAME_MACHINE = ("device", "processor", "gpu", "threads", "isa")
SAME_CODE = ("torch", "python", "cuda")


@dataclass(frozen=True)
class Change:
    """One row in two results: medians in microseconds, and what the alternatives' times were multiplied by."""

    group: str
    name: str
    old: float
    new: float
    drift: tuple[float, float]
    verdict: str  # "slower", "faster" or "same"

    @property
    def times(self) -> float:
        """New time over old, the machine's own change taken out."""
        return self.new / self.old / math.sqrt(self.drift[0] * self.drift[1])


def changes(old: dict, new: dict) -> list[Change]:
    pairs = [(row, _rows(new)[key]) for key, row in _rows(old).items() if key in _rows(new)]
    drifts = [drift for before, after in pairs if (drift := _drift(before, after))]
    usual = statistics.median([math.sqrt(low * high) for low, high in drifts]) if drifts else 1.0
    return [_change(before, after, _drift(before, after) or (usual, usual)) for before, after in pairs]


def missing(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """Rows that the new result lacks, and rows that it alone has."""
    before, after = _rows(old), _rows(new)
    return (
        [" ".join(key) for key in before if key not in after],
        [" ".join(key) for key in after if key not in before],
    )


def _rows(results: dict) -> dict[tuple[str, str], dict]:
    return {(row["group"], row["name"]): row for row in results["rows"]}


def _drift(before: dict, after: dict) -> tuple[float, float] | None:
    """The least and the greatest change among the alternatives that both results timed, of median and percentiles: the
    three change alike on a machine that is slower, and apart on one that is noisier.
    """
    common = [name for name in before["times"] if not is_ours(name, before) and name in after["times"]]
    percentiles = ("p20_us", "median_us", "p80_us")
    ratios = [after["times"][name][at] / before["times"][name][at] for name in common for at in percentiles]
    return (min(ratios), max(ratios)) if ratios else None


def _change(before: dict, after: dict, drift: tuple[float, float]) -> Change:
    was, now = before["times"][before["ours"]], after["times"][after["ours"]]
    if now["p20_us"] > was["p80_us"] * drift[1] * (1 + TOLERANCE):
        verdict = "slower"
    elif now["p80_us"] * (1 + TOLERANCE) < was["p20_us"] * drift[0]:
        verdict = "faster"
    else:
        verdict = "same"
    return Change(before["group"], before["name"], was["median_us"], now["median_us"], drift, verdict)


def differences(old: dict, new: dict, keys: tuple[str, ...]) -> list[str]:
    before, after = old["machine"], new["machine"]
    return [f"{key} {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def text(old: dict, new: dict) -> list[str]:
    lines = []
    if unlike := differences(old, new, SAME_MACHINE):
        lines += [f"WARNING: not the same machine ({'; '.join(unlike)}): times of the two say little of the code", ""]
    if unlike := differences(old, new, SAME_CODE):
        lines += [f"note: {'; '.join(unlike)}: the alternatives may have changed too", ""]
    found = changes(old, new)
    for verdict in ("slower", "faster"):
        some = sorted((x for x in found if x.verdict == verdict), key=lambda x: abs(math.log(x.times)), reverse=True)
        lines += [f"{len(some)} {verdict}" + (":" if some else "")]
        lines += [f"  {_line(change)}" for change in some]
    same = sum(change.verdict == "same" for change in found)
    lines += [f"{same} the same within the noise"]
    for title, names in zip(("gone", "new"), missing(old, new), strict=True):
        lines += [f"{len(names)} {title}: {'; '.join(names)}"] if names else []
    return [*lines, "", *RULE.format(tolerance=TOLERANCE).splitlines()]


def _line(change: Change) -> str:
    low, high = change.drift
    moved = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    times = f"{change.old:.1f} -> {change.new:.1f} µs"
    return f"{change.group}, {change.name}: {times}, {change.times:.2f}× (the machine itself {moved}×)"


def read(path: Path) -> dict:
    """A result of the suite; else an error that says what is the matter with the file."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if not isinstance(results, dict) or not {"machine", "rows"} <= results.keys():
        raise ValueError(f"{path} is no result of python -m bench")
    return results


def main(old: Path, new: Path) -> int:
    """Print the comparison; 1 if a row got slower, 2 if a file is no result, else 0."""
    try:
        before, after = read(old), read(new)
    except ValueError as error:
        sys.stderr.write(f"python -m bench: error: --compare: {error}\n")
        return 2
    sys.stdout.write("\n".join(text(before, after)) + "\n")
    return int(any(change.verdict == "slower" for change in changes(before, after)))
