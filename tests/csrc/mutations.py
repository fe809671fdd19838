"""Plants each bug of planted_bugs.py in a copy of csrc/, and asks the emulator's tests to notice it.

    python -m tests.csrc.mutations                             every bug; writes tests/csrc/emulator/mutations.md
    python -m tests.csrc.mutations --op layer_norm             this op's, and its rows of the table
    python -m tests.csrc.mutations --op layer_norm barrier     those whose name has the word, and writes nothing
    python -m tests.csrc.mutations --missing                   those that the table says nothing of yet
    python -m tests.csrc.mutations --every-mode ...            also in the builds after the first that notices

A bug is noticed where tests/csrc/test_schedules.py fails: in the plain build, which runs every schedule; else under
ASan and UBSan; else under TSan. The status is 1 if one is noticed nowhere. It takes about ten seconds a bug,
and half a minute more where the plain build does not notice.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.csrc import building
from tests.csrc.planted_bugs import BUGS, Bug
from tests.csrc.sanitized import command_and_environment

TABLE = building.EMULATOR / "mutations.md"
COPY = building.ROOT / "build" / "mutations" / "csrc"
MODES = ("plain", "asan", "tsan")
MISSED, NOT_ASKED = "-", ""
LONGEST = 3600  # seconds, on a busy machine; a kernel that hangs is noticed too
HEADER = """\
# Bugs planted in the CUDA kernels, and which build of the emulator's tests notices each

Written by `python -m tests.csrc.mutations`; the bugs are those of tests/csrc/planted_bugs.py, the tests
tests/csrc/test_schedules.py. *wrong*: the result fails the oracle, or differs between schedules. *emulator*: the
emulator refuses it (a deadlock, a divergent collective, an address that is not aligned). *asan*, *undefined*, *race*:
the sanitizer's report. *crash*, *hang*: the process ends, or does not. -: not noticed by that build. Builds after the
first that notices a bug were not all asked.
"""

# What the output of a failed run has in it, in the order in which it is asked.
VERDICTS = {
    "race": r"ThreadSanitizer: data race",
    "asan": r"ERROR: AddressSanitizer",
    "undefined": r"runtime error: ",
    "emulator": r"RuntimeError: block \(\d+, \d+, \d+\)",
    "wrong": r"AssertionError|Error: .*(Tensor-likes are not|not finite)",
}


def plant(bug: Bug) -> None:
    """COPY becomes csrc/ with the bug in it."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(building.CSRC, COPY)
    path = COPY / bug.file
    text = path.read_text()
    if text.count(bug.right) != 1:
        raise SystemExit(f"{bug.name}: its text occurs {text.count(bug.right)} times in csrc/{bug.file}, and not once")
    path.write_text(text.replace(bug.right, bug.wrong))


def verdict(bug: Bug, mode: str) -> str:
    """How the tests of bug.op notice what stands in COPY; MISSED if they don't."""
    arguments = ["-x", "tests/csrc/test_schedules.py", "-k", f"[{bug.op}-"]
    command, environment = command_and_environment(mode, arguments)
    environment = {**environment, "FUSED_TRANSFORMER_EMULATED_CSRC": str(COPY)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=building.ROOT,
            timeout=LONGEST,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hang"
    if "does not compile for the emulator" in done.stdout or "no tests ran" in done.stdout:
        raise SystemExit(f"{bug.name}, {mode}:\n{done.stdout[-4000:]}")
    if done.returncode == 0:
        return MISSED
    for word, pattern in VERDICTS.items():
        if re.search(pattern, done.stdout):
            return word
    if done.returncode < 0 or "Fatal Python error" in done.stdout:
        return "crash"
    raise SystemExit(f"{bug.name}, {mode}: the tests fail, and not for the bug\n{done.stdout[-4000:]}")


def verdicts(bug: Bug, every_mode: bool) -> list[str]:
    """A word for each of MODES."""
    words: list[str] = []
    for mode in MODES:
        noticed = any(word != MISSED for word in words)
        words.append(NOT_ASKED if noticed and not every_mode else verdict(bug, mode))
    return words


def is_noticed(words: Sequence[str]) -> bool:
    return any(word not in (MISSED, NOT_ASKED) for word in words)


def table(rows: Mapping[tuple[str, str], Sequence[str]]) -> str:
    lines = ["| op | bug | plain | ASan | TSan |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {op} | {name} | {' | '.join(words)} |" for (op, name), words in rows.items()]
    return f"{HEADER}\n" + "\n".join(lines) + "\n"


def read_table(path: Path = TABLE) -> dict[tuple[str, str], list[str]]:
    """(op, bug) -> the words of plain, ASan, TSan."""
    if not path.is_file():
        return {}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines()]
    return {(row[0], row[1]): row[2:] for row in cells if len(row) == 5 and row[0] not in ("op", "---")}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="this op's bugs alone")
    parser.add_argument("--every-mode", action="store_true", help="ask every build about every bug")
    parser.add_argument("--missing", action="store_true", help="only bugs that are not in the table yet")
    parser.add_argument("words", nargs="*", help="only bugs whose name has one of these in it")
    asked = parser.parse_args(arguments)
    of_op = [bug for bug in BUGS if asked.op in (None, bug.op)]
    chosen = [bug for bug in of_op if not asked.words or any(word in bug.name for word in asked.words)]
    if asked.missing:
        chosen = [bug for bug in chosen if (bug.op, bug.name) not in read_table()]
    found: dict[tuple[str, str], list[str]] = {}
    for bug in chosen:
        plant(bug)
        words = found[bug.op, bug.name] = verdicts(bug, asked.every_mode)
        print(f"{bug.op:16} {bug.name:60} {'  '.join(f'{word:9}' for word in words)}", flush=True)  # noqa: T201
        if not asked.words:  # at once, so that a run that is cut short keeps what it found
            known = {**read_table(), **found}
            TABLE.write_text(table({(b.op, b.name): known[b.op, b.name] for b in BUGS if (b.op, b.name) in known}))
    missed = [name for (_, name), words in found.items() if not is_noticed(words)]
    for name in missed:
        print(f"MISSED: {name}")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
