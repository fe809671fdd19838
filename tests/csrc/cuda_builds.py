"""What nvcc makes of the CUDA kernels, for GPUs that need not be here: registers, spills and shared memory of each.

    python -m tests.csrc.cuda_builds           a table
    python -m tests.csrc.cuda_builds --write   the same into bench/results/cuda_builds.json, which a test compares with
    python -m tests.csrc.cuda_builds --op layer_norm

Compiled as the build does it, and where an install with nvcc has left its objects in build/objects, not again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.csrc import building

RECORD = building.ROOT / "bench" / "results" / "cuda_builds.json"
ARCHS = ["sm_80", "sm_90a", "compute_80"]  # those of settings.DEFAULT_CUDA_ARCHS


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one architecture."""

    op: str
    kernel: str  # with its template arguments
    arch: str
    registers: int  # a thread
    spills: int  # bytes stored and loaded, a thread
    stack: int  # bytes a thread
    shared: int  # bytes of static shared memory, a block

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.kernel, self.arch


@cache
def toolkit() -> Any:
    """The CUDA toolkit that the build would find, or None."""
    return building.native().cuda_toolkit.find_toolkit()


def jobs(op: str | None = None) -> list:
    """The build's own jobs for csrc/<op>/*.cu."""
    import setuptools

    native = building.native()
    build = native.BuildNative(setuptools.Distribution())
    build.compiler_command, build.toolkit, build.archs = building.compiler(), toolkit(), ARCHS
    build.compiler_version = native.version_of(building.compiler())
    return [job for job in build._cuda_jobs() if op in (None, job.source.parent.name)]


def logs(op: str | None = None) -> dict[Path, str]:
    """What the compiler said of each .cu, compiling where need be."""
    native = building.native()
    native.settings.objects_folder().mkdir(parents=True, exist_ok=True)
    wanted = jobs(op)
    with ThreadPoolExecutor(native.settings.max_jobs()) as pool:
        list(pool.map(native.Job.run, wanted))
    return {job.source: job.log.read_text() for job in wanted}


def builds(op: str | None = None) -> list[Build]:
    found = [build for source, log in logs(op).items() for build in parsed(source.parent.name, log)]
    return sorted(found, key=lambda build: build.key)


def probe_log(source: Path, arch: str) -> str:
    """What nvcc says of a source of the tests, which the build does not know."""
    native = building.native()
    flags = [*building.FLAGS[:1], "-O3", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v", f"-I{building.CSRC}"]
    flags += [f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"]
    identity = [toolkit().version, *flags, *native.texts(source)]
    folder = building.ROOT / "build" / "probes"
    log = folder / f"{source.name}.{hashlib.sha256(' '.join(identity).encode()).hexdigest()[:16]}.log"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(toolkit().nvcc), *flags, "-c", str(source), "-o", os.devnull]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stdout[:8000]}")
        log.write_text(done.stdout)
    return log.read_text()


def parsed(op: str, log: str) -> list[Build]:
    """The kernels of a log of `nvcc -Xptxas=-v`."""
    found = []
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n"
        r".*Function properties for .*\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    matches = list(entry.finditer(log))
    names = [match["name"] for match in matches]
    demangled = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for match, name in zip(matches, demangled.splitlines(), strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Build(
                op=op,
                kernel=short(name),
                arch=match["arch"],
                registers=int(match["registers"]),
                spills=int(match["stores"]) + int(match["loads"]),
                stack=int(match["stack"]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    assert len(found) == len(re.findall("Compiling entry function", log)), "nvcc's report looks otherwise than expected"
    return found


def short(demangled: str) -> str:
    """`void fused::cuda::(anonymous namespace)::kernel<float, 4>(fused::Args)` -> `kernel<float, 4>`."""
    name = re.sub(r"\(anonymous namespace\)::|\b(fused|cuda)::", "", demangled.removeprefix("void "))
    return name.partition("(")[0]


def table(rows: list[Build]) -> str:
    names = ("op", "kernel", "arch", "registers", "spills", "stack", "shared")
    cells = [names, *(tuple(str(getattr(row, name)) for name in names) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def read_record() -> tuple[str | None, list[Build]]:
    """nvcc's version and the builds of the committed record."""
    if not RECORD.is_file():
        return None, []
    record = json.loads(RECORD.read_text())
    return record["nvcc"], [Build(**row) for row in record["builds"]]


def write_record(rows: list[Build], op: str | None) -> None:
    """Replaces what the record says of this op, or all of it. A row a line, so that a diff can be read.

    One process at a time reads, changes and writes it, so that runs for several ops lose nothing of each other, and a
    reader finds the old record or the new one whole.
    """
    folder = building.ROOT / "build"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{RECORD.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = [] if op is None else [row for row in read_record()[1] if row.op != op]
        lines = ",\n".join(json.dumps(asdict(row)) for row in sorted([*kept, *rows], key=lambda build: build.key))
        part = RECORD.with_suffix(f".{os.getpid()}.part")
        part.write_text(f'{{"nvcc": "{toolkit().version}", "builds": [\n{lines}\n]}}\n')
        part.replace(RECORD)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.csrc.cuda_builds", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--write", action="store_true", help=f"write {os.path.relpath(RECORD, building.ROOT)}")
    options = parser.parse_args()
    if toolkit() is None:
        raise SystemExit("no CUDA toolkit was found: " + building.native().cuda_toolkit.searched())
    rows = builds(options.op)
    if options.write:
        write_record(rows, options.op)
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
