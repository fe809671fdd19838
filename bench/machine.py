"""Facts about the machine that a row of results is worthless without."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from bench.timing import Stamp
from fused_transformer.kernels import _native


@cache
def facts() -> dict:
    """Processor, threads, instruction set, versions and commit; on a GPU its name, driver limits and CUDA version."""
    known = {
        "device": Stamp.device,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": _native.library().isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if Stamp.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return known


def processor() -> str:
    """The model name as the system gives it; with family and model where it has no number, as in virtual machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in told and "model" in told and not any(letter.isdigit() for letter in name):
        return f"{name} (family {told['cpu family']}, model {told['model']})"
    return name


def commit() -> str | None:
    """The commit of this checkout, with + where it has changes; None outside a repository."""
    root = Path(__file__).parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
