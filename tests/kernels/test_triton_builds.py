"""The Triton kernels compiled for GPUs that are not here: what they take, and when they are compiled again.

What was measured is committed in bench/results/triton_builds.json; `python -m tests.offline --write` makes it anew.
Compiling takes many minutes on two cores, so `make builds` does it and `make test` does not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from fused_transformer.kernels import OPS
from tests import offline
from tests.offline import ARCHS, ROOT, SHARED_LIMIT, Build

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Another release of Triton or ptxas may allocate otherwise; these are what a record of one says about another.
OTHER_REGISTERS, OTHER_SPILLS = 32, 64


compiles = pytest.mark.skipif(
    "FUSED_TRANSFORMER_BUILDS" not in os.environ, reason="compiling the Triton kernels takes minutes: make builds"
)


@cache
def compiled() -> list[Build]:
    """Every build. A process of its own: in this one the kernels may have been made for the interpreter."""
    return [Build(**row) for row in json.loads(run("--json"))]


def run(*arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.offline", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@compiles
def test_every_build_is_on_record_and_takes_no_more_than_it_did():
    version, recorded = offline.read_record()
    known = {(*b.key, b.warps, b.stages): b for b in recorded}
    import triton

    same = triton.__version__ == version
    problems = []
    for build in compiled():
        before = known.get((*build.key, build.warps, build.stages))
        if before is None:
            problems.append(f"{build}: not on record")
            continue
        if build.registers > before.registers + (0 if same else OTHER_REGISTERS):
            problems.append(f"{build}: {before.registers} registers on record")
        if build.spills > before.spills + (0 if same else OTHER_SPILLS):
            problems.append(f"{build}: {before.spills} bytes of spills on record")
        if build.loop_spills > before.loop_spills + (0 if same else OTHER_SPILLS // 8):
            problems.append(f"{build}: {before.loop_spills} spilling instructions in the loop on record")
        if same and build.shared > before.shared:
            problems.append(f"{build}: {before.shared} bytes of shared memory on record")
        if build.tensor_core != before.tensor_core and before.tensor_core != "-" and same:
            problems.append(f"{build}: {before.tensor_core} on record")
    assert not problems, "\n".join(problems)


@compiles
def test_shared_memory_fits_every_gpu():
    for build in compiled():
        assert build.shared <= SHARED_LIMIT[build.arch], build


def test_loops_on_tensor_cores_spill_next_to_nothing():
    rows = [b for b in offline.read_record()[1] if b.tensor_core != "-"]
    assert any(b.loop for b in rows)
    plain = [b for b in rows if "bias, window, dropout" not in b.job]  # which needs a tile of registers for each
    assert {(b.job, b.arch): b.loop_spills for b in plain if b.loop_spills > 2} == {}
    assert all(b.loop_spills <= 0.02 * b.loop for b in rows)


@compiles
def test_sixteen_bit_attention_is_on_tensor_cores():
    wanted = {80: {"mma"}, 90: {"wgmma", "mma"}, 100: {"tcgen05", "mma"}}
    rows = [b for b in compiled() if b.job.startswith("attention:") and "float32" not in b.job]
    products = [
        b for b in rows if b.kernel in {"attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
    ]
    assert products
    for build in products:
        assert build.tensor_core in wanted[build.arch], build
    hopper = Counter(b.tensor_core for b in products if b.arch == 90)
    assert hopper["wgmma"] > hopper["mma"], hopper


def test_there_are_builds_for_every_op_with_a_triton_backend():
    names = {path.parent.name for path in (ROOT / "kernels").glob("*/triton.py")}
    assert names == set(offline.ops()) & set(OPS)
    assert {build.arch for build in offline.read_record()[1]} == set(ARCHS)


@compiles
@pytest.mark.parametrize("op", offline.ops())
def test_other_sizes_compile_nothing_new(op):
    """Twenty calls that differ in batch, length and row count alone: the first compiles all there is to compile."""
    (compiles,) = json.loads(run("--vary", "--op", op))
    assert len(compiles) == 20 and compiles[0] >= 1, compiles
    assert not any(compiles[1:]), f"calls that compiled again: {[i for i, n in enumerate(compiles) if i and n]}"
