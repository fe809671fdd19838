"""Compiles csrc/ into an extension module, with neither torch nor a build system beside setuptools; and csrc/with_torch
into a second one, where torch is installed.

Which files, and how often each:

    *.simd.cpp    once per instruction set, with FT_ISA its name (csrc/common/isa.h chooses at run time)
    *.dots.cpp    with AVX-512 and its dot products, *.tiles.cpp with AMX, on x86-64 where the compiler knows them;
                  FT_WITH_DOTS and FT_WITH_TILES tell the others that they are there (csrc/common/extensions.h)
    bind*.cpp     once; these alone see the headers of Python, pybind11 and CUDA, and FUSED_WITH_CUDA where it is built
    *.cpp         once
    *.cu          by nvcc, for every architecture asked for; beside the object a .log of what ptxas said of each kernel
    with_torch/   once, with torch's headers, for the module `_torch`; where that fails the package does without
    *_sm90.cu     by nvcc, for sm_90a alone (wgmma and TMA exist nowhere else); FT_WITH_SM90 says they are there

Objects are kept in build/objects under a hash of all that went into them, so an install after an edit compiles
what the edit touched. The environment's CXX, CXXFLAGS, LDFLAGS and NVCCFLAGS are heeded; settings.py has the rest.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import cuda_toolkit
import settings
import with_torch
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

ROOT = settings.ROOT
CSRC = ROOT / "csrc"
WITH_TORCH = CSRC / "with_torch"

# baseline is what the compiler assumes unasked: SSE2 on x86-64, NEON on aarch64.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
EXTENSIONS = {
    "dots": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "tiles": [*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}

WARNINGS = ["-Wall", "-Wextra"]
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
CPU_FLAGS = ["-fopenmp", "-ffp-contract=fast", "-fno-math-errno"]
KEPT_PER_SOURCE = 8  # objects of earlier edits and other flags, before the oldest is deleted


@dataclass
class Job:
    """One object file: `command` reads `source`; `identity` is what the object depends on beside its text."""

    source: Path
    label: str  # the instruction set, or ""
    command: list[str]
    identity: list[str]
    keeps_log: bool = False  # what the compiler says goes into `log`
    target: Path = field(init=False)  # the object, once it is there

    def __post_init__(self) -> None:
        stem = ".".join(filter(None, [*self.source.relative_to(CSRC).parts, self.label]))
        digest = hashlib.sha256("\0".join([*self.identity, *texts(self.source)]).encode()).hexdigest()[:16]
        self.target = settings.objects_folder() / f"{stem}.{digest}.o"

    @property
    def log(self) -> Path:
        return self.target.with_suffix(".log")

    def run(self) -> None:
        if self.target.exists() and (self.log.exists() or not self.keeps_log):
            self.target.touch()  # so that it counts as used
            return
        print(f"compiling {self.source.relative_to(ROOT)}", f"for {self.label}" if self.label else "", flush=True)
        part = self.target.with_suffix(f".{os.getpid()}.part.o")
        command = [*self.command, "-c", str(self.source), "-o", str(part)]
        if self.keeps_log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            # ptxas's own report is for whoever asks; an error or a warning is for everyone
            told = [line for line in done.stdout.splitlines() if not re.match(r"ptxas info|    \d+ bytes stack", line)]
            print("\n".join(told), end="\n" if told else "", flush=True)
            if done.returncode == 0:
                self.log.write_text(done.stdout)
        else:
            done = subprocess.run(command, check=False)
        if done.returncode or not part.exists():
            part.unlink(missing_ok=True)
            raise CompileError(f"{self.source.relative_to(ROOT)} did not compile")
        part.replace(self.target)  # whole or not at all


def texts(source: Path, csrc: Path | None = None) -> list[str]:
    """The text of a source and of every file of csrc that it includes, directly or not."""
    csrc = csrc or CSRC
    seen: dict[Path, str] = {}
    todo = [source]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen[path] = path.read_text(encoding="utf-8")
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', seen[path], re.MULTILINE):
            todo += [found for found in ((path.parent / name).resolve(), csrc / name) if found.is_file()]
    return [f"{os.path.relpath(path, csrc)}\n{seen[path]}" for path in sorted(seen)]


def host_compiler(command: list[str]) -> str:
    """What nvcc may call itself, out of CXX: not a cache or a distributor ahead of it, as in "ccache g++"."""
    return next((word for word in command if Path(word).name not in ("ccache", "sccache", "distcc")), command[0])


def version_of(compiler: list[str]) -> str:
    """The first line of the compiler's --version; an error that says what to do where there is none."""
    if shutil.which(compiler[0]) is None:
        raise PlatformError(f"a C++17 compiler is needed and {compiler[0]!r} was not found: install g++, or set CXX")
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown version"])[0]


class BuildNative(build_ext):
    """build_ext that makes csrc/ into the two extensions of this package."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = None  # the second extension is compiled beside the first

    def build_extension(self, ext) -> None:
        if ext.name.endswith("._torch"):
            self._link_with_torch(ext)
            return
        if sys.platform != "linux":
            raise PlatformError(f"fused-transformer compiles on Linux (x86-64 and aarch64), not on {sys.platform}")
        try:
            self.compiler_command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        except ValueError as error:
            raise PlatformError(f"CXX can't be read as a command: {error}, got {os.environ['CXX']!r}") from None
        self.compiler_version = version_of(self.compiler_command)
        self.toolkit = self._toolkit()
        self.archs = settings.cuda_archs() if self.toolkit else []
        settings.objects_folder().mkdir(parents=True, exist_ok=True)

        jobs = [*self._cpu_jobs(), *self._cuda_jobs()]
        self.torch = with_torch.find_torch() if with_torch.wanted() != "0" else "FUSED_TRANSFORMER_NODES=0 asks for none"
        self._say_plan()
        with ThreadPoolExecutor(settings.max_jobs()) as pool:
            # first, since it takes longest
            self.nodes = None if isinstance(self.torch, str) else pool.submit(self._compile_with_torch)
            list(pool.map(Job.run, jobs))
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        self._link(jobs, output)
        self._prune(jobs)
        print(f"linked {output.name}, {output.stat().st_size / 1e6:.2f} MB", flush=True)

    def get_source_files(self) -> list[str]:
        return []  # csrc enters the sdist through MANIFEST.in

    def _toolkit(self) -> cuda_toolkit.Toolkit | None:
        wanted = settings.cuda_wanted()
        if wanted == "0":
            return None
        toolkit = cuda_toolkit.find_toolkit()
        if toolkit is None and wanted == "1":
            raise PlatformError(
                "FUSED_TRANSFORMER_CUDA=1, but no CUDA toolkit (nvcc, cuda_runtime_api.h and libcudart_static.a) was "
                f"found; searched: {cuda_toolkit.searched()}. Set CUDA_HOME to one, or install without "
                "--no-build-isolation and with CUDA_HOME unset: then nvcc is fetched as a wheel."
            )
        return toolkit

    def _cpu_jobs(self) -> Iterator[Job]:
        import pybind11

        x86 = self._machine() in ("x86_64", "amd64")
        instruction_sets = INSTRUCTION_SETS if x86 else {"baseline": []}
        self.instruction_sets = list(instruction_sets)
        user = shlex.split(os.environ.get("CXXFLAGS", ""))
        extensions = {name: on for name, on in EXTENSIONS.items() if x86 and self._knows(on)}
        flags = [*HOST_FLAGS, *CPU_FLAGS, *(f"-DFT_WITH_{name.upper()}" for name in extensions), *user]
        cuda = [f'-DFT_CUDA_ARCHS="{";".join(self.archs)}"', "-DFUSED_WITH_CUDA"] if self.toolkit else []
        cuda += ["-DFT_WITH_SM90"] if "sm_90a" in self.archs else []
        for source in sorted(CSRC.rglob("*.cpp")):
            if source.parent == WITH_TORCH:
                continue
            if source.name.endswith(".simd.cpp"):
                for name, isa_flags in instruction_sets.items():
                    yield self._cpu_job(source, name, [*flags, f"-DFT_ISA={name}", *isa_flags])
            elif source.name.endswith(tuple(f".{name}.cpp" for name in EXTENSIONS)):
                name = source.name.split(".")[-2]
                if name in extensions:
                    label = f"avx512_{name}"
                    yield self._cpu_job(source, label, [*flags, f"-DFT_ISA={label}", *extensions[name]])
            elif source.name.startswith("bind"):
                # What pybind11 makes of a signature is no kernel, and a third quicker to compile at -O1.
                by_pybind11 = not source.name.startswith("bind_direct")
                own = ["-O1" if flag == "-O3" and by_pybind11 else flag for flag in flags]
                # Their folders may be those of a build environment that is gone tomorrow: versions stand for them.
                versions = [f"pybind11 {pybind11.__version__}", f"Python {sys.version} {sysconfig.get_platform()}"]
                folders = [pybind11.get_include(), sysconfig.get_paths()["include"]]
                if self.toolkit:
                    versions.append(f"CUDA {self.toolkit.version}")
                    folders.append(str(self.toolkit.include))
                yield self._cpu_job(source, "", [*own, *cuda], versions, folders)
            else:
                yield self._cpu_job(source, "", flags)

    def _knows(self, flags: list[str]) -> bool:
        """Whether the compiler takes these flags."""
        command = [*self.compiler_command, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _cpu_job(self, source: Path, label: str, flags: list[str], versions=(), folders=()) -> Job:
        paths = [f"-I{CSRC}", *(f"-isystem{folder}" for folder in folders)]
        identity = [*self.compiler_command, self.compiler_version, *flags, *versions]
        return Job(source, label, [*self.compiler_command, *flags, *paths], identity)

    def _cuda_jobs(self) -> Iterator[Job]:
        if self.toolkit is None:
            return
        user = shlex.split(os.environ.get("NVCCFLAGS", ""))
        host = ",".join(flag for flag in HOST_FLAGS if flag.startswith(("-f", "-W")))
        flags = ["-std=c++17", "-O3", "--threads=1", f"-ccbin={host_compiler(self.compiler_command)}", f"-Xcompiler={host}", *user]
        flags += ["-DFUSED_WITH_CUDA", "-Xptxas=-v"]
        if int(self.toolkit.version.partition(".")[0]) >= 13:  # which needs a driver that can unpack it anyway
            flags.append("--compress-mode=size")
        for source in sorted(CSRC.rglob("*.cu")):
            archs = [a for a in self.archs if a == "sm_90a"] if source.stem.endswith("_sm90") else self.archs
            if archs:
                arch_flags = [f"-gencode=arch=compute_{a.partition('_')[2]},code={a}" for a in archs]
                identity = [self.toolkit.version, self.compiler_version, *flags, *arch_flags]
                command = [str(self.toolkit.nvcc), *flags, *arch_flags, f"-I{CSRC}"]
                yield Job(source, "", command, identity, keeps_log=True)

    def _compile_with_torch(self) -> Job:
        flags = [*HOST_FLAGS, f'-DFT_TORCH_VERSION="{self.torch.version}"', *shlex.split(os.environ.get("CXXFLAGS", ""))]
        versions = [f"torch {self.torch.version}", f"Python {sys.version} {sysconfig.get_platform()}"]
        folders = [*self.torch.includes, sysconfig.get_paths()["include"]]
        job = self._cpu_job(WITH_TORCH / "module.cpp", "", flags, versions, folders)
        job.run()
        return job

    def _link_with_torch(self, ext) -> None:
        """A package without it is slower where calls are small and no less right, so what fails here is only said."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if self.nodes is None:
                raise CompileError(str(self.torch))
            job = self.nodes.result()
            self._make([str(job.target), *self.torch.link_flags], output, "import torch; ")
            self._prune([job])
        except (CompileError, LinkError) as error:
            output.unlink(missing_ok=True)  # of an earlier build
            if self.inplace or self.editable_mode:
                for old in (ROOT / "kernels").glob("_torch.*.so"):
                    old.unlink()
            if with_torch.wanted() == "1":  # setuptools lets an optional extension's own errors pass
                raise SystemExit(f"FUSED_TRANSFORMER_NODES=1, but {error}") from None
            print(f"fused-transformer: NO AUTOGRAD NODES: {error}; small calls with gradients go through Python")
            return
        print(f"linked {output.name} with torch {self.torch.version}, {output.stat().st_size / 1e6:.2f} MB", flush=True)

    def _link(self, jobs: list[Job], output: Path) -> None:
        # Baseline objects first: of an inline function that several objects carry the linker keeps the first, and
        # one compiled with AVX flags must not be the one that a processor without AVX runs.
        objects = [str(job.target) for job in sorted(jobs, key=lambda job: job.label.startswith("avx"))]
        if self.toolkit:
            # By g++ and with the static runtime's full path: nvcc's own link line looks for a lib64 that the
            # wheels do not have. Its symbols stay inside, since torch may bring another cudart.
            objects += [str(self.toolkit.cudart), "-ldl", "-lrt", "-lpthread"]
        self._make(["-fopenmp", *objects], output)

    def _make(self, linked: list[str], output: Path, before_import: str = "") -> None:
        command = [*self.compiler_command, "-shared", *shlex.split(os.environ.get("LDFLAGS", "")), *linked]
        if "-g" not in shlex.split(os.environ.get("CXXFLAGS", "")):
            command.append("-s")
        output.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not the old one rewritten: a process that has the old one loaded keeps it.
        part = output.with_name(f"{output.name}.{os.getpid()}.part")
        command += [f"-Wl,--version-script={ROOT / '_build' / 'exports.map'}", "-o", str(part)]
        if subprocess.run(command, check=False).returncode:
            part.unlink(missing_ok=True)
            raise LinkError(f"{output.name} did not link")
        self._try_import(part, output.name.partition(".")[0], before_import)
        part.replace(output)

    def _try_import(self, extension: Path, name: str, before: str) -> None:
        """A symbol that no source defines shows only now, and is better told here than at the user's first import."""
        if self._machine() != platform.machine() or "-fsanitize" in os.environ.get("LDFLAGS", ""):
            return  # for another machine, or waiting for a runtime that must be loaded first
        loader = "from importlib.machinery import ExtensionFileLoader as L; import sys; L(*sys.argv[1:]).load_module()"
        # for torch, -I: past a build environment of pip's own, as in with_torch.py
        alone = ["-I"] if before and find_spec("torch") is None else []
        command = [sys.executable, *alone, "-W", "ignore", "-c", before + loader, name, str(extension)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            extension.unlink()
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise LinkError(f"the extension links but does not import: {reason}")

    def _prune(self, jobs: list[Job]) -> None:
        for job in jobs:
            stem = job.target.name.rsplit(".", 2)[0]
            objects = job.target.parent.glob(f"{stem}.{'?' * 16}.o")
            kept = sorted(objects, key=lambda path: path.stat().st_mtime, reverse=True)
            for old in kept[KEPT_PER_SOURCE:]:
                old.unlink(missing_ok=True)
                old.with_suffix(".log").unlink(missing_ok=True)

    def _machine(self) -> str:
        # The compiler's target, not this machine: CXX may be a cross compiler.
        done = subprocess.run([*self.compiler_command, "-dumpmachine"], capture_output=True, text=True, check=False)
        return (done.stdout.strip().partition("-")[0] or platform.machine()).lower()

    def _say_plan(self) -> None:
        print(f"fused-transformer: CPU kernels for {', '.join(self.instruction_sets)} with {self.compiler_version}")
        if self.toolkit:
            print(f"fused-transformer: CUDA kernels for {', '.join(self.archs)} with nvcc {self.toolkit.version}")
        elif settings.cuda_wanted() == "0":
            print("fused-transformer: no CUDA kernels, as FUSED_TRANSFORMER_CUDA=0 asks")
        else:
            print("fused-transformer: NO CUDA KERNELS: no toolkit found in", cuda_toolkit.searched())
            print("fused-transformer: FUSED_TRANSFORMER_CUDA=1 demands them, and fetches nvcc if need be")
        sys.stdout.flush()
