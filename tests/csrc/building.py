"""Compiles .cu files with g++ for the emulator of tests/csrc/emulator, into libraries that run them on the CPU.

    build_op("layer_norm")            an extension module: csrc/layer_norm/bind.cpp and csrc/layer_norm/*.cu as they are
    build_library([path], "tsan")     a library of C functions, for ctypes

What was compiled is kept in build/emulated/<mode> under a hash of all that went into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).resolve().parent / "emulator"
BUILD = ROOT / "build" / "emulated"
FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
KERNEL_FLAGS = (*FLAGS, "-O1", "-DFT_EMULATED", "-DFUSED_WITH_CUDA", "-DFT_WITH_SM90")
KEPT = 8  # of the objects and libraries of one name, before the oldest is deleted


@dataclass(frozen=True)
class Mode:
    """What the kernels are compiled with, and how the emulator, which is not instrumented, is told of it."""

    flags: tuple[str, ...] = ()
    define: tuple[str, ...] = ()


UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
MODES = {
    "plain": Mode(),
    "asan": Mode(("-fsanitize=address", *UNDEFINED), ("-DEMU_ASAN",)),
    "tsan": Mode(("-fsanitize=thread",), ("-DEMU_TSAN",)),
    "ucontext": Mode((), ("-DEMU_UCONTEXT",)),  # the way of processors that fiber.cpp has no assembly for
}


@cache
def native() -> ModuleType:
    """_build/native.py: what compiles csrc/ when the package is installed."""
    sys.path.insert(0, str(ROOT / "_build"))
    try:
        import native
    finally:
        sys.path.pop(0)
    return native


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


@cache
def _headers_of_the_emulator() -> str:
    return "\0".join(f"{path.name}\n{path.read_text()}" for path in sorted(EMULATOR.glob("*.h")))


@dataclass(frozen=True)
class Object:
    """One object file; its name has a hash of the source, all that it includes, the compiler and its flags."""

    source: Path
    flags: tuple[str, ...]
    csrc: Path = CSRC
    name: str = ""  # default: that of the source
    folders: tuple[str, ...] = ()  # where more headers are, and
    versions: tuple[str, ...] = ()  # which these are

    def target(self, folder: Path) -> Path:
        inside = self.csrc if self.source.is_relative_to(self.csrc) else self.source.parent
        texts = native().texts(self.source, self.csrc)
        identity = [
            *compiler(),
            native().version_of(compiler()),
            *self.flags,
            *self.versions,
            _headers_of_the_emulator(),
        ]
        digest = hashlib.sha256("\0".join([*identity, *texts]).encode()).hexdigest()[:16]
        return folder / f"{self.name or '.'.join(self.source.relative_to(inside).parts)}.{digest}.o"

    def compile(self, folder: Path) -> Path:
        target = self.target(folder)
        if target.exists():
            target.touch()  # so that it counts as used
            return target
        part = target.with_suffix(f".{os.getpid()}.part.o")
        includes = [f"-I{self.csrc}", f"-I{EMULATOR}", *(f"-isystem{path}" for path in self.folders)]
        command = [*compiler(), *self.flags, *includes, "-x", "c++", "-c", str(self.source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"{self.source.name} does not compile for the emulator:\n{done.stderr[:8000]}")
        part.replace(target)
        return target


def build_op(op: str, mode: str = "plain", csrc: Path = CSRC, folder: Path | None = None) -> Path:
    """The extension module `_emulated` of `op`; RuntimeError with the compiler's words if it does not compile.

    Args:
        mode: one of MODES.
        csrc: where the .cu and bind.cpp are taken from: a copy of csrc/ with a bug planted, say. The CPU half is
            always this checkout's.
        folder: where to keep what is made. Default: build/emulated/<mode>.
    """
    kernels = [Object(source, (*KERNEL_FLAGS, *_marks(mode)), csrc) for source in sorted((csrc / op).glob("*.cu"))]
    return _build(op, [*kernels, *_binding(op, csrc)], mode, folder, lambda: _cpu_half(op))


def build_library(sources: Sequence[Path], mode: str = "plain", folder: Path | None = None) -> Path:
    """A library of the C functions that the sources, which may hold kernels, define."""
    flags = (*KERNEL_FLAGS, "-fvisibility=default", *_marks(mode))
    return _build(sources[0].stem, [Object(source, flags) for source in sources], mode, folder, list)


def _marks(mode: str) -> tuple[str, ...]:
    return (*MODES[mode].define, *MODES[mode].flags)


def _emulator(mode: str) -> Iterator[Object]:
    for source in sorted(EMULATOR.glob("*.cpp")):
        # what the emulated instructions touch counts as the kernels' doing
        marks = _marks(mode) if source.name == "memory.cpp" else MODES[mode].define
        if source.name != "module.cpp":
            yield Object(source, (*FLAGS, "-O2", *marks))


def _binding(op: str, csrc: Path) -> Iterator[Object]:
    import pybind11

    flags = (*KERNEL_FLAGS, "-O0", "-fopenmp")
    folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
    versions = (f"pybind11 {pybind11.__version__}", f"Python {sys.version}")
    yield Object(csrc / op / "bind.cpp", flags, csrc, folders=folders, versions=versions)
    register = (*flags, f"-DFT_REGISTER=register_{op}")
    direct = csrc / op / "bind_direct.cpp"
    if direct.exists():
        register += (f"-DFT_DIRECT=add_{op}",)
        for source in (direct, *sorted((csrc / "common").glob("bind_direct*.cpp"))):
            yield Object(source, flags, csrc, folders=folders, versions=versions)
    yield Object(EMULATOR / "module.cpp", register, csrc, f"module.{op}", folders, versions)


def _cpu_half(op: str) -> list[Path]:
    """The op's CPU kernels, which bind.cpp names: what installing the package left in build/objects, or made anew."""
    import setuptools

    build = native().BuildNative(setuptools.Distribution())
    build.compiler_command, build.toolkit, build.archs = compiler(), None, []
    build.compiler_version = native().version_of(compiler())
    folders = (CSRC / op, CSRC / "common")
    jobs = [job for job in build._cpu_jobs() if job.source.parent in folders and not job.source.name.startswith("bind")]
    jobs.sort(key=lambda job: job.label.startswith("avx"))  # as the build links them, and for its reason
    native().settings.objects_folder().mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(native().settings.max_jobs()) as pool:
        list(pool.map(native().Job.run, jobs))
    return [job.target for job in jobs]


def _build(name: str, objects: list[Object], mode: str, folder: Path | None, more: Callable[[], list[Path]]) -> Path:
    folder = folder or BUILD / mode
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers build one after another: the second finds the first's
        with ThreadPoolExecutor(native().settings.max_jobs()) as pool:
            made = list(pool.map(lambda each: each.compile(folder), [*objects, *_emulator(mode)]))
        names = [str(path) for path in (*more(), *made)]
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
        target = folder / f"{name}.{digest}.so"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            command = [*compiler(), "-shared", "-fopenmp", *MODES[mode].flags, *names, "-o", str(part)]
            subprocess.run(command, check=True)
            part.replace(target)
        target.touch()
        _prune([*made, target])
    return target


def _prune(used: list[Path]) -> None:
    for path in used:
        stem, _, suffix = path.name.rsplit(".", 2)
        same = sorted(path.parent.glob(f"{stem}.{'?' * 16}.{suffix}"), key=lambda p: p.stat().st_mtime)
        for old in same[:-KEPT]:
            old.unlink(missing_ok=True)
