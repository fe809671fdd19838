"""The CUDA backends on a machine without a GPU: every .cu of csrc/ compiled by g++ and run on the CPU.

tests/csrc/emulator is what takes the place of the GPU. Each op becomes an extension module of its own, of
csrc/<op>/bind.cpp and csrc/<op>/*.cu as they are, compiled with FT_EMULATED; its `..._cuda` functions take addresses of
CPU tensors. It is built when a test first needs it, and kept in build/emulated under a hash of all that went into it.

`install()`, which conftest.py calls, puts the emulator in the place of a device: from then on `running_on("cuda")` of
tests/inputs.py runs kernels/<op>/cuda.py on CPU tensors, and the op tests' backend "cuda" is named cuda-emulated.
Outside of running_on the backend refuses CPU tensors as it always does.

The environment says how: FUSED_TRANSFORMER_EMULATED=plain|asan|tsan (the last two need the sanitizer's library in
LD_PRELOAD, see _build/sanitize.sh), and EMU_ORDER and EMU_ASYNC as tests/csrc/emulator/block.h has them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).resolve().parent / "csrc" / "emulator"
BUILD = ROOT / "build" / "emulated"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
KEPT = 8  # of the objects and modules with one name, before the oldest is deleted

# A test with more elements than this in one tensor is skipped: the emulator takes about a microsecond for each.
MOST_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Mode:
    """How the kernels are compiled, and what the emulator, which is not instrumented, is told of it."""

    name: str
    flags: tuple[str, ...] = ()
    define: tuple[str, ...] = ()


UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
MODES = {
    "plain": Mode("plain"),
    "asan": Mode("asan", ("-fsanitize=address", *UNDEFINED), ("-DEMU_ASAN",)),
    "tsan": Mode("tsan", ("-fsanitize=thread",), ("-DEMU_TSAN",)),
}


# ---------------------------------------------------------------- building


@cache
def _native() -> ModuleType:
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
def _text_of_the_emulator() -> str:
    return "\0".join(f"{path.name}\n{path.read_text()}" for path in sorted(EMULATOR.iterdir()) if path.is_file())


@dataclass(frozen=True)
class Object:
    """One object file of an emulated module."""

    source: Path
    label: str
    flags: tuple[str, ...]
    includes: tuple[str, ...]
    versions: tuple[str, ...]  # of what lies in `includes`, beside csrc and the emulator
    csrc: Path

    def target(self, folder: Path) -> Path:
        inside = self.csrc if self.source.is_relative_to(self.csrc) else EMULATOR
        texts = _native().texts(self.source, inside)
        identity = [*compiler(), _native().version_of(compiler()), *self.flags, *self.versions]
        digest = hashlib.sha256("\0".join([*identity, *texts, _text_of_the_emulator()]).encode()).hexdigest()[:16]
        return folder / f"{'.'.join(self.source.relative_to(inside).parts)}{self.label}.{digest}.o"

    def compile(self, folder: Path) -> Path:
        target = self.target(folder)
        if target.exists():
            target.touch()  # so that it counts as used
            return target
        part = target.with_suffix(f".{os.getpid()}.part.o")
        includes = [f"-I{self.csrc}", f"-I{EMULATOR}", *(f"-isystem{path}" for path in self.includes)]
        command = [*compiler(), *self.flags, *includes, "-x", "c++", "-c", str(self.source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"{self.source.name} does not compile for the emulator:\n{done.stderr[:8000]}")
        part.replace(target)
        return target


def _objects(op: str, mode: Mode, csrc: Path) -> Iterator[Object]:
    import pybind11

    kernel_flags = (*FLAGS, "-DFT_EMULATED", "-DFUSED_WITH_CUDA", "-DFT_WITH_SM90", *mode.flags)
    for source in sorted((csrc / op).glob("*.cu")):
        yield Object(source, "", kernel_flags, (), (), csrc)
    python = (pybind11.get_include(), sysconfig.get_paths()["include"])
    versions = (f"pybind11 {pybind11.__version__}", sys.version)
    bind_flags = (*FLAGS, "-O0", "-DFT_EMULATED", "-DFUSED_WITH_CUDA", "-DFT_WITH_SM90", "-fopenmp")
    for source in sorted((csrc / op).glob("bind*.cpp")):
        yield Object(source, "", bind_flags, python, versions, csrc)
    for source in sorted(EMULATOR.glob("*.cpp")):
        if source.name == "module.cpp":
            yield Object(source, f".{op}", (*bind_flags, f"-DFT_REGISTER=register_{op}"), python, versions, csrc)
        elif source.name == "memory.cpp":  # what the emulated instructions touch counts as the kernels' doing
            yield Object(source, "", (*FLAGS, "-O2", *mode.define, *mode.flags), (), (), csrc)
        else:
            yield Object(source, "", (*FLAGS, "-O2", *mode.define), (), (), csrc)


def _cpu_objects(op: str) -> list[Path]:
    """The CPU half of the op, which bind.cpp names: the objects that installing the package left, or made again."""
    import setuptools

    native = _native()
    build = native.BuildNative(setuptools.Distribution())
    build.compiler_command, build.toolkit, build.archs = compiler(), None, []
    build.compiler_version = native.version_of(compiler())
    jobs = [
        job
        for job in build._cpu_jobs()
        if job.source.parent in (CSRC / op, CSRC / "common") and not job.source.name.startswith("bind")
    ]
    native.settings.objects_folder().mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(native.settings.max_jobs()) as pool:
        list(pool.map(native.Job.run, jobs))
    return [job.target for job in sorted(jobs, key=lambda job: job.label.startswith("avx"))]


def build(op: str, mode: str = "plain", csrc: Path = CSRC, folder: Path | None = None) -> Path:
    """The emulated module of `op`; RuntimeError with the compiler's words if it does not compile.

    Args:
        mode: "plain", "asan" or "tsan".
        csrc: where the .cu and bind.cpp are taken from; a copy of csrc/ with a bug planted, say. The CPU half is
            always this checkout's.
        folder: where objects and modules are kept. Default: build/emulated/<mode>.
    """
    folder = folder or BUILD / mode
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers build one after another: the second finds the first's
        cpu = _cpu_objects(op)
        with ThreadPoolExecutor(_native().settings.max_jobs()) as pool:
            objects = list(pool.map(lambda each: each.compile(folder), _objects(op, MODES[mode], csrc)))
        names = [str(path) for path in (*cpu, *objects)]
        digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:16]
        target = folder / f"{op}.{digest}.so"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            command = [*compiler(), "-shared", "-fopenmp", *MODES[mode].flags, *names, "-o", str(part)]
            subprocess.run(command, check=True)
            part.replace(target)
        target.touch()
        _prune([*objects, target])
    return target


def _prune(used: list[Path]) -> None:
    for path in used:
        stem, _, suffix = path.name.rsplit(".", 2)
        same = sorted(path.parent.glob(f"{stem}.{'?' * 16}.{suffix}"), key=lambda p: p.stat().st_mtime)
        for old in same[:-KEPT]:
            old.unlink(missing_ok=True)


@cache
def load(op: str, mode: str = "plain") -> ModuleType:
    """The emulated module of `op`, built if need be."""
    loader = ExtensionFileLoader("_emulated", str(build(op, mode)))
    spec = spec_from_loader("_emulated", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


# ---------------------------------------------------------------- in the place of a device


class Library:
    """What stands for `_C`: each function `<op>_...` is that of the op's emulated module."""

    cuda_archs = "emulated"

    def __getattr__(self, name: str) -> Any:
        ops = [path.parent.name for path in CSRC.glob("*/bind.cpp") if name.startswith(f"{path.parent.name}_")]
        if not ops:
            raise AttributeError(f"no op of csrc/ has a function {name}")
        return getattr(load(max(ops, key=len), os.environ.get("FUSED_TRANSFORMER_EMULATED", "") or "plain"), name)


_wanted: ContextVar[bool] = ContextVar("emulator_wanted", default=False)
_capability: ContextVar[tuple[int, int]] = ContextVar("emulated_capability", default=(8, 0))
_installed = False


def installed() -> bool:
    """Whether the backend "cuda" is the emulator in this process."""
    return _installed


@contextmanager
def wanted() -> Iterator[None]:
    """Inside, the CUDA backends take CPU tensors."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def capability(major: int, minor: int) -> Iterator[None]:
    """Inside, the emulated device is of this compute capability; 8.0 otherwise."""
    token = _capability.set((major, minor))
    try:
        yield
    finally:
        _capability.reset(token)


def install() -> None:
    """Puts the emulator in the place of a CUDA device, where there is none and a compiler is."""
    global _installed
    if _installed or torch.cuda.is_available() or shutil.which(compiler()[0]) is None:
        return
    from fused_transformer.kernels import _cuda, _native

    refuses_on_a_device = _cuda.refuses_tensors

    def refuses_tensors(**tensors):
        if not _wanted.get():
            return refuses_on_a_device(**tensors)
        most = max((x.numel() for x in tensors.values() if x is not None), default=0)
        too_many = f"{most} elements take the emulator too long" if most > MOST_ELEMENTS else None
        return _native.refuses_tensors("cpu", **tensors) or too_many

    def on_current_stream(function, x):
        return lambda *args: function(*args, 0)

    _cuda.library = Library
    _cuda.refuses_tensors = refuses_tensors
    _cuda.current = lambda x: nullcontext()
    _cuda.on_current_stream = on_current_stream
    _cuda.capability = lambda device: _capability.get()
    _cuda.multiprocessors = lambda device: 2
    _installed = True
