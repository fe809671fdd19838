"""Compiles the Triton kernels for GPUs that are not here, and tells what the compiler made of them.

    python -m tests.offline                     what each kernel takes on sm_80, sm_90 and sm_100, as a table
    python -m tests.offline --write             and into bench/results/triton_builds.json, which a test compares with
    python -m tests.offline --op attention --arch 90

Nothing about a kernel is repeated here: the ops are called as users call them (tests/kernels/builds_<op>.py names the
calls), and inside `compiling_for` a launch compiles exactly what it would launch and goes on. This needs a process in
which triton was imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from inspect import signature
from multiprocessing import get_context
from pathlib import Path

from tests import sass

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "triton_builds.json"
ARCHS = (80, 90, 100)
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may take
TENSOR_CORE = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}  # PTX -> what the table says


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one architecture."""

    job: str  # the call that launches it
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int  # a thread
    spills: int  # bytes stored plus bytes loaded, a thread
    shared: int  # bytes a block
    tensor_core: str  # wgmma, tcgen05, mma or -
    loop: int = 0  # instructions of the loop over whole tiles, 0 where there is none
    loop_spills: int = 0  # those of them that reach local memory, which are the spills that cost

    @property
    def key(self) -> tuple[str, str, int]:
        return self.job, self.kernel, self.arch


@contextmanager
def compiling_for(arch: int) -> Iterator[list]:
    """Inside, the Triton backends take CPU tensors, and a launch compiles for sm_<arch> and runs nothing.

    Yields the list of (kernel name, triton's CompiledKernel), one for each launch, in order.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fused_transformer.kernels import _triton

    assert not triton.knobs.runtime.interpret, "kernels that were decorated for the interpreter can't be compiled"

    class NoDevice:
        """As much of a driver as compiling asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return arch  # triton keeps compiled kernels by device

        def get_current_stream(self, device):
            return 0

    launched: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    replaced = {
        "INTERPRETED": True,
        "capability": lambda device: divmod(arch, 10),
        "multiprocessors": lambda device: MULTIPROCESSORS[arch],
        "current": lambda x: nullcontext(),
    }
    kept = {name: getattr(_triton, name) for name in replaced}
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoDevice())
    JITFunction.run = compile_only
    for name, value in replaced.items():
        setattr(_triton, name, value)
    try:
        yield launched
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = before
        for name, value in kept.items():
            setattr(_triton, name, value)


def describe(job: str, name: str, kernel, arch: int) -> Build:
    """What ptxas says of a compiled kernel. Its PTX is assembled once more: Triton throws ptxas's words away."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    ptxas = get_ptxas(arch) if signature(get_ptxas).parameters else get_ptxas()  # Triton 3.5 has one for all
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [
            ptxas.path,
            "-v",
            *([] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]),
            f"--gpu-name={sm_arch_from_capability(arch)}",
            source.name,
            "-o",
            "cubin",
        ]
        said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    instruction = next((word for ptx, word in TENSOR_CORE.items() if ptx in kernel.asm["ptx"]), "-")
    meta = kernel.metadata
    loop = sass.main_loop(sass.disassemble(kernel.asm["cubin"])) or sass.Loop(0, 0, 0)
    taken = registers, spills, meta.shared, instruction, loop.instructions, loop.spills
    return Build(job, name, arch, meta.num_warps, meta.num_stages, *taken)


def jobs(op: str) -> dict[str, Callable[[], object]]:
    """The calls of an op that are compiled, by name."""
    return importlib.import_module(f"tests.kernels.builds_{op}").JOBS


def ops() -> list[str]:
    return sorted(path.stem.removeprefix("builds_") for path in (ROOT / "tests" / "kernels").glob("builds_*.py"))


def builds(op: str, job: str, arch: int) -> list[Build]:
    """What one call compiles; a kernel that it launches twice with the same machine code stands there once."""
    from fused_transformer.kernels import use_backend

    with compiling_for(arch) as launched, use_backend("triton"):
        jobs(op)[job]()
    found = {describe(f"{op}: {job}", name, kernel, arch): None for name, kernel in launched}
    return list(found)


def all_builds(chosen_ops: list[str], archs: list[int], workers: int | None = None) -> list[Build]:
    """Every job of the ops for every architecture, on all cores or as many."""
    wanted = [(op, job, arch) for op in chosen_ops for job in jobs(op) for arch in archs]
    # spawned, not forked: torch's threads do not survive a fork
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = pool.map(builds, *zip(*wanted, strict=True))
        return sorted((b for some in results for b in some), key=lambda b: (*b.key, b.warps, b.stages, b.shared))


def compiles_of_other_sizes(op: str, calls: int = 20) -> list[int]:
    """How many kernels each of `calls` calls compiled that none before it had: all but the first should be 0."""
    from fused_transformer.kernels import use_backend

    vary = importlib.import_module(f"tests.kernels.builds_{op}").vary
    seen: set[int] = set()
    counts = []
    for index in range(calls):
        with compiling_for(90) as launched, use_backend("triton"):
            vary(index)
        new = {id(kernel) for _, kernel in launched} - seen
        seen |= new
        counts.append(len(new))
    return counts


def table(rows: list[Build]) -> str:
    names = [field.name for field in fields(Build)]
    cells = [names, *(tuple(str(getattr(row, name)) for name in names) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(prog="python -m tests.offline", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", choices=ops(), help="this op alone (may be repeated)")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHS, help="this architecture alone")
    parser.add_argument("--vary", action="store_true", help="print how much each of 20 calls of other sizes compiles")
    parser.add_argument("--workers", type=int, help="compile on this many cores, not on all")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--write", action="store_true", help=f"write {RECORD.relative_to(ROOT)}, for all that was not left out"
    )
    options = parser.parse_args()
    if options.vary:
        print(json.dumps([compiles_of_other_sizes(op) for op in options.op or ops()]))  # noqa: T201
        return
    rows = all_builds(options.op or ops(), options.arch or list(ARCHS), options.workers)
    if options.write:
        write_record(triton.__version__, rows, options.op or ops(), options.arch or list(ARCHS))
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))  # noqa: T201
    else:
        print(table(rows))  # noqa: T201


def write_record(version: str, rows: list[Build], chosen_ops: list[str], archs: list[int]) -> None:
    """Replaces what the record says of these ops and architectures. A row a line, so that a diff can be read."""
    old = [row for row in read_record()[1] if row.job.partition(":")[0] not in chosen_ops or row.arch not in archs]
    lines = ",\n".join(
        json.dumps(asdict(row)) for row in sorted([*old, *rows], key=lambda b: (*b.key, b.warps, b.shared))
    )
    RECORD.write_text(f'{{"triton": "{version}", "builds": [\n{lines}\n]}}\n')


def read_record() -> tuple[str | None, list[Build]]:
    """Triton's version and the builds of the committed record."""
    if not RECORD.is_file():
        return None, []
    record = json.loads(RECORD.read_text())
    return record["triton"], [Build(**row) for row in record["builds"]]


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("unset TRITON_INTERPRET: it makes kernels that can't be compiled")
    main()
