"""Finds a CUDA toolkit: CUDA_HOME or CUDA_PATH, nvcc on PATH, /usr/local/cuda, or NVIDIA's wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    include: Path
    cudart: Path  # libcudart_static.a
    version: str


def find_toolkit(with_wheels: bool = True) -> Toolkit | None:
    """The first complete toolkit, or None. If CUDA_HOME or CUDA_PATH is set, no other place is tried."""
    for root in _roots(with_wheels):
        toolkit = _toolkit_at(root)
        if toolkit is not None:
            return toolkit
    return None


def searched() -> str:
    """The places of find_toolkit, for a message."""
    named = named_root()
    if named is not None:
        return f"{named[0]}={named[1]}"
    return "CUDA_HOME (not set), nvcc on PATH, /usr/local/cuda and the nvidia-cuda-nvcc wheel"


def named_root() -> tuple[str, str] | None:
    """The variable that says where the toolkit is, and what it says; None if none is set."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return variable, os.environ[variable]
    return None


def _roots(with_wheels: bool) -> Iterator[Path]:
    named = named_root()
    if named is not None:
        yield Path(named[1])
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield _root_of(on_path)
    yield Path("/usr/local/cuda")
    if with_wheels:
        spec = find_spec("nvidia")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(folder).glob("cu*"), reverse=True)


def _root_of(nvcc: str) -> Path:
    # The nvcc on PATH may be a script that starts another one: --dryrun tells where the real one lives.
    lines = _output([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull])
    match = re.search(r"^#\$ _HERE_=(.+)$", lines, re.MULTILINE)
    return (Path(match.group(1).strip()) if match else Path(nvcc).resolve().parent).parent


def _toolkit_at(root: Path) -> Toolkit | None:
    nvcc = root / "bin" / "nvcc"
    targets = sorted(root.glob("targets/*-linux"))
    includes = [d for d in (root / "include", *(t / "include" for t in targets)) if (d / "cuda_runtime_api.h").exists()]
    folders = (root / "lib64", root / "lib", *(t / "lib" for t in targets))  # the wheels have lib and no lib64
    libraries = [d / "libcudart_static.a" for d in folders if (d / "libcudart_static.a").exists()]
    if not (nvcc.exists() and includes and libraries):
        return None
    match = re.search(r"V(\d+\.\d+\.\d+)", _output([str(nvcc), "--version"]))
    return Toolkit(nvcc, includes[0], libraries[0], match.group(1)) if match else None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:  # not for this machine, or not executable
        return ""
    return done.stdout
