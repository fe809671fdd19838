"""The CPU kernels by the lesser instruction sets that they are compiled for (csrc/common/isa.h).

A process has one of them from its start to its end. So the tests marked every_isa run again in a process of their own,
one for each: what this processor is best at they ran with already.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_transformer.kernels import _native

FOLDER = Path(__file__).parent
MARKED = sorted(path for path in FOLDER.glob("test_*.py") if "pytest.mark." + "every_isa" in path.read_text())
KERNELS = {path.parent.name for path in (FOLDER.parents[1] / "csrc").glob("*/*.simd.cpp")}
SETS = ("baseline", "avx2", "avx512")


def test_each_op_with_such_kernels_has_such_tests():
    tested = {path.stem.removeprefix("test_") for path in MARKED}
    assert tested >= KERNELS, KERNELS - tested


@pytest.mark.slow
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set(isa):
    if not _native.available():
        pytest.skip("this needs the compiled extension")
    if isa not in SETS[: SETS.index(_native.library().isa())]:
        pytest.skip(f"{isa} is what the other tests ran with, or this processor has no such instructions")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"FUSED_TRANSFORMER_ISA": isa, "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "every_isa"]
    done = subprocess.run(
        [*command, *map(str, MARKED)],
        env=environment,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"under {isa}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 1000, f"hardly a test ran under {isa}:\n{done.stdout[-2000:]}"
