"""Compiles fused_transformer.kernels._C with the C++ compiler alone: no torch at build time."""

import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86_FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma", "-mf16c"],
             "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
                        "-mprefer-vector-width=512"]}


class BuildExt(build_ext):
    def build_extension(self, ext):
        import pybind11

        objects = ROOT / "build" / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        flags = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra",
                 "-ffp-contract=fast", "-fno-math-errno", f"-I{pybind11.get_include()}",
                 f"-I{sysconfig.get_paths()['include']}"]
        newest = max(p.stat().st_mtime for p in [*(ROOT / "csrc").rglob("*.h"), ROOT / "setup.py"])
        jobs = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            for isa, isa_flags in X86_FLAGS.items() if source.name.endswith(".simd.cpp") else [("", [])]:
                stem = ".".join([*source.relative_to(ROOT / "csrc").parts, isa])
                extra = [f"-DFT_ISA={isa}", *isa_flags] if isa else []
                jobs.append((source, objects / f"{stem}.o", [*cxx, *flags, *extra]))

        def compile_one(job):
            source, target, command = job
            if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
                print("compiling", target.name, flush=True)
                subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        # Baseline objects first: of an inline function that several objects carry, the linker keeps the first.
        ordered = sorted((str(job[1]) for job in jobs), key=lambda name: "avx" in name)
        subprocess.run([*cxx, "-shared", "-fopenmp", "-s", *ordered, "-o", str(out)], check=True)


setup(
    packages=["fused_transformer", "fused_transformer.kernels", "fused_transformer.kernels.attention"],
    package_dir={"fused_transformer": "transformer", "fused_transformer.kernels": "kernels"},
    ext_modules=[Extension("fused_transformer.kernels._C", [])],
    cmdclass={"build_ext": BuildExt},
)
