"""nvcc's verdict on the CUDA kernels, without a GPU: no warning, no spill, no more registers than are on record.

The record is bench/results/cuda_builds.json; `python -m tests.csrc.cuda_builds --write` makes it anew.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fused_transformer.kernels import _native
from tests.csrc import building, cuda_builds

# Kernels that may keep something in local memory, and why; none may where it is not said here. How much is on record,
# and may not grow.
MAY_SPILL: dict[str, str] = {}
SHARED_LIMIT = 48 * 1024  # static: more than this can only be asked for at the launch
STATIC_BESIDE_DYNAMIC = 8 * 1024

needs_nvcc = pytest.mark.skipif(cuda_builds.toolkit() is None, reason="no CUDA toolkit (nvcc) on this machine")
OPS = sorted({path.parent.name for path in building.CSRC.glob("*/*.cu")})


# C75xx: ptxas can't follow the registers of a wgmma and waits for it where nobody asked to.
COMPLAINTS = re.compile(r"^.*(warning|\(C75\d\d\)).*$", re.IGNORECASE | re.MULTILINE)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_is_compiled_with_a_warning(op):
    for source, log in cuda_builds.logs(op).items():
        assert not COMPLAINTS.search(log), f"{source.name}:\n{COMPLAINTS.search(log)[0]}"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("probe", "arch"), [("probe_emulator.cu", "sm_80"), ("probe_hopper.cu", "sm_90a")])
def test_each_wrapper_of_an_instruction_is_one_that_ptxas_knows(probe, arch):
    log = cuda_builds.probe_log(building.EMULATOR.parent / probe, arch)
    assert not COMPLAINTS.search(log), COMPLAINTS.search(log)[0]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_spills(op):
    for build in cuda_builds.builds(op):
        if build.kernel.partition("<")[0] not in MAY_SPILL:
            assert build.spills == 0 and build.stack == 0, build
        assert build.shared <= SHARED_LIMIT, build


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_static_and_unasked_dynamic_memory_fit_together(op):
    """A GPU refuses a launch whose static and dynamic memory are more than 48 KB together, unless more was asked for;
    csrc/common/launch.cuh asks for it from 40 KB of dynamic memory on."""
    if not any("dynamic_shared()" in source.read_text() for source in (building.CSRC / op).glob("*.cu")):
        pytest.skip(f"{op} has no kernel with dynamic shared memory")
    for build in cuda_builds.builds(op):
        assert build.shared <= STATIC_BESIDE_DYNAMIC, build


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_takes_more_than_is_on_record(op):
    version, recorded = cuda_builds.read_record()
    if version != cuda_builds.toolkit().version:
        pytest.skip(f"the record is of nvcc {version}, and another allocates otherwise")
    known = {build.key: build for build in recorded}
    problems = []
    for build in cuda_builds.builds(op):
        before = known.get(build.key)
        if before is None:
            problems.append(f"{build}: not on record")
        elif any(getattr(build, what) > getattr(before, what) for what in ("registers", "spills", "stack")):
            problems.append(f"{build}: on record is {before}")
    assert not problems, "\n".join(problems)


def test_the_extension_stays_small():
    library = _native.library()
    if not library.cuda_archs:
        pytest.skip("this build has no CUDA")
    if cuda_builds.toolkit() is None or int(cuda_builds.toolkit().version.partition(".")[0]) < 13:
        pytest.skip("nvcc before 13 does not compress machine code by itself")
    assert Path(library.__file__).stat().st_size < 20e6


def test_the_record_is_of_todays_kernels():
    _, recorded = cuda_builds.read_record()
    sources = {op: "".join(p.read_text() for p in (building.CSRC / op).glob("*.cu*")) for op in OPS}
    assert {build.op for build in recorded} == set(OPS)
    for build in recorded:
        assert f"{build.kernel.partition('<')[0]}(" in sources[build.op], f"{build.kernel} is no longer there"
        assert build.arch in cuda_builds.ARCHS


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5fused4cuda12_GLOBAL__N_110row_kernelIfLi4EEEvPKfl' for 'sm_80'
ptxas info    : Function properties for _ZN5fused4cuda12_GLOBAL__N_110row_kernelIfLi4EEEvPKfl
    16 bytes stack frame, 16 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 256 bytes smem, 488 bytes cmem[0]
ptxas info    : Compile time = 132.681 ms
"""


def test_a_report_is_read():
    (build,) = cuda_builds.parsed("op", LOG)
    assert build == cuda_builds.Build("op", "row_kernel<float, 4>", "sm_80", 40, 64, 16, 256)


def test_several_writers_lose_nothing_of_each_other(tmp_path, monkeypatch):
    (build,) = cuda_builds.parsed("op", LOG)
    ops = [f"op{number}" for number in range(5)]
    read = cuda_builds.read_record

    def read_slowly():
        record = read()
        time.sleep(0.02)  # for the others to write meanwhile, if they may
        return record

    monkeypatch.setattr(cuda_builds, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(cuda_builds, "toolkit", lambda: SimpleNamespace(version="13.0"))
    monkeypatch.setattr(cuda_builds, "read_record", read_slowly)
    with ThreadPoolExecutor(len(ops)) as pool:
        list(pool.map(lambda op: cuda_builds.write_record([replace(build, op=op)], op), ops))
    version, rows = read()
    assert version == "13.0" and [row.op for row in rows] == ops
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
