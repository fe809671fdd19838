"""--compare OLD.json NEW.json: which rows and points of curves got slower or faster by more than what was noise when
they were measured, and what holds more or less memory.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.report import is_ours
from bench.report_growth import plain, title

RULE = """\
A row is slower if the 20th percentile of its new times is above the 80th of its old ones, and faster if it is the other
way round, by more than {tolerance:.0%} and after the old times were moved as the machine moved: by the change of the
alternatives timed in the same rounds. They did not change, so what they took longer the machine took; where they, or
their 20th and 80th percentiles and medians, disagree, the row is judged by the one that excuses most. A row without
alternatives moves as the median row.
A point of a curve has a median alone: it is slower or faster by more than {point:.0%}, after the same was done by what
the alternatives took at its size and at the sizes beside it. Memory is counted and not timed: it is more or less by
more than {memory:.0%}, whatever the machine did."""
TOLERANCE = 0.05
# Three results of one Zen 3 among other guests: by this rule 0 to 2 of 67 points of later ones are slower.
POINT_TOLERANCE = 0.25
MEMORY_TOLERANCE = 0.03
WORSE = ("slower", "more")
SAME_MACHINE = ("device", "processor", "gpu", "threads", "isa")
SAME_CODE = ("torch", "python", "cuda")


@dataclass(frozen=True)
class Change:
    """A row or a point of a curve in two results: medians in microseconds, and what the alternatives' times were
    multiplied by. Of memory: bytes, and no drift.
    """

    group: str
    name: str
    old: float
    new: float
    drift: tuple[float, float]
    verdict: str  # "slower", "faster" or "same"; of memory "more", "less" or "same"

    @property
    def times(self) -> float:
        """New over old, the machine's own change taken out."""
        if not self.old:
            return math.inf if self.new else 1.0
        return self.new / self.old / math.sqrt(self.drift[0] * self.drift[1])


def changes(old: dict, new: dict) -> list[Change]:
    """Of rows."""
    pairs = _pairs(_rows, old, new)
    drifts = [_drift(before, after) for before, after in pairs.values()]
    return [_change(*pair, drift) for pair, drift in zip(pairs.values(), _filled(drifts), strict=True)]


def points(old: dict, new: dict) -> list[Change]:
    """Of curves of times: each size that both results have."""
    pairs = _pairs(_points, old, new)
    own = {at: _ratios(*pair) for at, pair in pairs.items()}
    drifts = []
    for (group, _), (before, _) in pairs.items():
        near = [ratio for beside in before["near"] for ratio in own.get((group, beside), [])]
        drifts.append((min(near), max(near)) if near else None)
    made, far = [], 1 + POINT_TOLERANCE
    for ((group, size), (before, after)), drift in zip(pairs.items(), _filled(drifts), strict=True):
        was, now = before["values"][before["ours"]], after["values"][after["ours"]]
        verdict = "slower" if now > was * drift[1] * far else "faster" if now * far < was * drift[0] else "same"
        made.append(Change(group, f"at {size}", was, now, drift, verdict))
    return made


def memory(old: dict, new: dict) -> list[Change]:
    """Of all that was counted in bytes: what is held at most, alone and along a curve."""
    made, far = [], 1 + MEMORY_TOLERANCE
    for (group, name), (was, now) in _pairs(_held, old, new).items():
        verdict = "more" if now > was * far else "less" if now * far < was else "same"
        made.append(Change(group, name, was, now, (1.0, 1.0), verdict))
    return made


def missing(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """Rows, points and memory that the new result lacks, and those that it alone has."""
    before, after = _names(old), _names(new)
    return [name for name in before if name not in after], [name for name in after if name not in before]


def _names(results: dict) -> dict[str, None]:
    told = [" ".join(key) for key in _rows(results)]
    told += [f"{group} at {size}" for group, size in _points(results)]
    return dict.fromkeys(told + [f"memory of {group}, {name}" for group, name in _held(results)])


def _pairs(part: Callable[[dict], dict], old: dict, new: dict) -> dict:
    before, after = part(old), part(new)
    return {key: (before[key], after[key]) for key in before if key in after}


def _rows(results: dict) -> dict[tuple[str, str], dict]:
    return {(row["group"], row["name"]): row for row in results["rows"]}


def _points(results: dict) -> dict[tuple[str, int], dict]:
    """By curve and size, where ours was timed: the times of all, and the sizes there are around it."""
    found = {}
    for curve in _curves(results, "µs"):
        for place, size in enumerate(curve["sizes"]):
            values = {label: of_label[place] for label, of_label in curve["values"].items() if of_label[place]}
            near = curve["sizes"][max(place - 1, 0) : place + 2]
            if curve["ours"] in values:
                found[_named(curve), size] = {"ours": curve["ours"], "values": values, "near": near}
    return found


def _held(results: dict) -> dict[tuple[str, str], int]:
    """Bytes of ours, in each of its ways ("fused in chunks")."""
    found = {}
    for entry in results.get("memory", []):
        for label, peak in entry["peak_bytes"].items():
            if is_ours(label, entry):
                way = "" if label == entry["ours"] else f", {plain(label)}"
                found[f"{entry['name']}, {entry['what']}", entry["shape"] + way] = peak
    for row in results["rows"]:
        if "peak_bytes" in row:
            found[row["group"], row["name"]] = row["peak_bytes"][row["ours"]]
    for curve in _curves(results, "bytes"):
        own = zip(curve["sizes"], curve["values"][curve["ours"]], strict=True)
        found |= {(_named(curve), f"at {size}"): peak for size, peak in own if peak is not None}
    return found


def _curves(results: dict, unit: str) -> list[dict]:
    return [curve for curve in results.get("curves", []) if curve["unit"] == unit]


def _named(curve: dict) -> str:
    return f"{title(curve)} ({curve['fixed']})"


def _ratios(before: dict, after: dict) -> list[float]:
    """What the alternatives took longer at one point of a curve."""
    was, now = before["values"], after["values"]
    return [now[label] / was[label] for label in was if not is_ours(label, before) and label in now]


def _filled(drifts: list[tuple[float, float] | None]) -> list[tuple[float, float]]:
    """The median one for those without alternatives."""
    known = [math.sqrt(drift[0] * drift[1]) for drift in drifts if drift]
    usual = statistics.median(known) if known else 1.0
    return [drift or (usual, usual) for drift in drifts]


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
    lines += _told([*changes(old, new), *points(old, new)], ("slower", "faster"), _line)
    lines[-1] += " within the noise"
    if held := memory(old, new):
        lines += _told(held, ("more", "less"), _memory_line, " memory")
    for heading, names in zip(("gone", "new"), missing(old, new), strict=True):
        lines += [f"{len(names)} {heading}: {'; '.join(names)}"] if names else []
    rule = RULE.format(tolerance=TOLERANCE, point=POINT_TOLERANCE, memory=MEMORY_TOLERANCE)
    return [*lines, "", *rule.splitlines()]


def _told(found: list[Change], verdicts: tuple[str, str], line: Callable[[Change], str], what: str = "") -> list[str]:
    """Those of each verdict, the greatest change first; how many are the same."""
    lines = []
    for verdict in verdicts:
        some = sorted((x for x in found if x.verdict == verdict), key=_greatness, reverse=True)
        lines += [f"{len(some)} {verdict}{what}" + (":" if some else "")]
        lines += [f"  {line(change)}" for change in some]
    return [*lines, f"{sum(change.verdict == 'same' for change in found)} the same{what}"]


def _greatness(change: Change) -> float:
    return abs(math.log(change.times)) if change.times else math.inf


def _line(change: Change) -> str:
    low, high = change.drift
    moved = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    times = f"{change.old:.1f} -> {change.new:.1f} µs"
    return f"{change.group}, {change.name}: {times}, {change.times:.2f}× (the machine itself {moved}×)"


def _memory_line(change: Change) -> str:
    return f"{change.group}, {change.name}: {change.old:,} -> {change.new:,} bytes, {change.times:.2f}×"


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
    """Print the comparison; 1 if a row or point got slower or anything holds more memory, 2 if a file is no result,
    else 0.
    """
    try:
        before, after = read(old), read(new)
    except ValueError as error:
        sys.stderr.write(f"python -m bench: error: --compare: {error}\n")
        return 2
    sys.stdout.write("\n".join(text(before, after)) + "\n")
    found = [*changes(before, after), *points(before, after), *memory(before, after)]
    return int(any(change.verdict in WORSE for change in found))
