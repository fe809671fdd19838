"""The build's own parts: what the environment may say, where a toolkit is looked for, when an object is reused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_build"))
try:
    import cuda_toolkit
    import fused_backend
    import native
    import settings
finally:
    sys.path.pop(0)


@pytest.fixture(autouse=True)
def _a_silent_environment(monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH", "FUSED_TRANSFORMER_CUDA", "FUSED_TRANSFORMER_CUDA_ARCHS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["sm_80", "sm_90a", "compute_80"]),
        ("90", ["sm_90"]),
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("sm_80, sm_90a compute_90", ["sm_80", "sm_90a", "compute_90"]),
        ("100a+PTX", ["sm_100a", "compute_100a"]),
        ("12.0 80 8.0", ["sm_120", "sm_80"]),
    ],
)
def test_architectures_are_read_in_every_usual_spelling(monkeypatch, text, expected):
    monkeypatch.setenv("FUSED_TRANSFORMER_CUDA_ARCHS", text)
    assert settings.cuda_archs() == expected


@pytest.mark.parametrize("text", ["hopper", "80;sm90x", "8", "80-90", ";"])
def test_what_is_no_architecture_is_refused(monkeypatch, text):
    monkeypatch.setenv("FUSED_TRANSFORMER_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match="FUSED_TRANSFORMER_CUDA_ARCHS must be a list like"):
        settings.cuda_archs()


def test_cuda_is_auto_never_or_must(monkeypatch):
    assert settings.cuda_wanted() == "auto"
    for text in ("auto", "0", "1"):
        monkeypatch.setenv("FUSED_TRANSFORMER_CUDA", text)
        assert settings.cuda_wanted() == text
    monkeypatch.setenv("FUSED_TRANSFORMER_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        settings.cuda_wanted()


@pytest.mark.parametrize("text", ["0", "-1", "two"])
def test_max_jobs_is_a_positive_number(monkeypatch, text):
    assert settings.max_jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert settings.max_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive number"):
        settings.max_jobs()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A toolkit laid out as NVIDIA's wheels are: lib and no lib64."""
    root = tmp_path / "toolkit"
    nvcc = script(
        root / "bin" / "nvcc",
        'if [ "$1" = --dryrun ]; then echo "#\\$ _HERE_=$(dirname "$0")" >&2\n'
        'else echo "Cuda compilation tools, release 13.0, V13.0.88"; fi',
    )
    for name in ("include/cuda_runtime_api.h", "lib/libcudart_static.a"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return cuda_toolkit.Toolkit(nvcc, root / "include", root / "lib" / "libcudart_static.a", "13.0.88")


def test_cuda_home_says_where_the_toolkit_is(monkeypatch, toolkit):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.include.parent))
    assert cuda_toolkit.find_toolkit() == toolkit


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime_api.h", "lib/libcudart_static.a"])
def test_half_a_toolkit_is_none(monkeypatch, toolkit, missing):
    root = toolkit.include.parent
    (root / missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert cuda_toolkit.find_toolkit() is None
    assert cuda_toolkit.searched() == f"CUDA_HOME={root}"


def test_an_nvcc_on_the_path_may_be_a_script_that_starts_another(monkeypatch, toolkit, tmp_path):
    script(tmp_path / "elsewhere" / "nvcc", f'exec {toolkit.nvcc} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'elsewhere'}:/usr/bin:/bin")
    assert cuda_toolkit.find_toolkit() == toolkit


def test_compiler_wheels_are_asked_for_only_where_cuda_must_be_and_no_toolkit_is(monkeypatch, toolkit):
    def required():
        wheel, editable = (
            [name for name in hook() if name.startswith("nvidia-")]
            for hook in (fused_backend.get_requires_for_build_wheel, fused_backend.get_requires_for_build_editable)
        )
        assert wheel == editable
        return wheel

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cuda_toolkit, "find_toolkit", lambda with_wheels=True: None)
    for text in ("auto", "0"):
        monkeypatch.setenv("FUSED_TRANSFORMER_CUDA", text)
        assert required() == []
    monkeypatch.setenv("FUSED_TRANSFORMER_CUDA", "1")
    assert len(required()) == 5
    assert {name.partition("==")[2] for name in required()} == {f"{fused_backend.CUDA_VERSION}.*"}
    monkeypatch.setenv("CUDA_HOME", "/nowhere")  # a mistake to report, not to download around
    assert required() == []
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(cuda_toolkit, "find_toolkit", lambda with_wheels=True: toolkit)
    assert required() == []


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    folder = tmp_path / "csrc"
    (folder / "common").mkdir(parents=True)
    (folder / "op").mkdir()
    (folder / "common" / "deep.h").write_text("#pragma once\n")
    (folder / "common" / "shared.h").write_text('#include "deep.h"\n#include <vector>\n')
    (folder / "op" / "op.cpp").write_text('#include "common/shared.h"\n')
    (folder / "op" / "other.cpp").write_text("int other;\n")
    monkeypatch.setattr(native, "CSRC", folder)
    monkeypatch.setenv("FUSED_TRANSFORMER_OBJECTS", str(tmp_path / "objects"))
    return folder


def target(csrc, name="op.cpp", flags=("-O3",), label=""):
    return native.Job(csrc / "op" / name, label, ["false"], list(flags)).target


def test_an_object_is_reused_while_all_that_went_into_it_is_the_same(csrc):
    first, other = target(csrc), target(csrc, "other.cpp")
    assert target(csrc) == first
    assert first.parent == csrc.parent / "objects"
    assert len({first, other, target(csrc, flags=("-O2",)), target(csrc, label="avx2")}) == 4
    for header in ("shared.h", "deep.h"):
        before = target(csrc)
        (csrc / "common" / header).write_text("#pragma once\nint edited;\n" + (csrc / "common" / header).read_text())
        assert target(csrc) != before, f"{header} was edited"
    assert target(csrc, "other.cpp") == other


def test_a_source_that_does_not_compile_leaves_no_object(csrc):
    job = native.Job(csrc / "op" / "op.cpp", "", ["false"], [])
    job.target.parent.mkdir()
    native_root, native.ROOT = native.ROOT, csrc.parent
    try:
        with pytest.raises(native.CompileError, match=r"csrc/op/op\.cpp did not compile"):
            job.run()
    finally:
        native.ROOT = native_root
    assert list(job.target.parent.iterdir()) == []


def test_nvcc_gets_the_compiler_and_not_what_caches_it():
    assert native.host_compiler(["ccache", "g++-12", "-m64"]) == "g++-12"
    assert native.host_compiler(["/usr/bin/ccache", "/opt/bin/clang++"]) == "/opt/bin/clang++"
    assert native.host_compiler(["ccache"]) == "ccache"


def test_a_compiler_that_makes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_TRANSFORMER_OBJECTS", str(tmp_path / "objects"))
    (tmp_path / "objects").mkdir()
    job = native.Job(settings.ROOT / "csrc" / "bindings.cpp", "", ["true"], [])
    with pytest.raises(native.CompileError, match=r"csrc/bindings\.cpp did not compile"):
        job.run()


def test_a_missing_compiler_says_what_to_install():
    with pytest.raises(native.PlatformError, match=r"'no-such-compiler' was not found: install g\+\+, or set CXX"):
        native.version_of(["no-such-compiler"])


def test_each_source_is_compiled_for_what_its_name_says(csrc, toolkit, monkeypatch):
    for name in ("op.cu", "fast_sm90.cu", "op.simd.cpp", "bind.cpp", "op.dots.cpp", "op.tiles.cpp"):
        (csrc / "op" / name).touch()
    build = native.BuildNative(setuptools.Distribution())
    build.compiler_command, build.compiler_version = ["g++"], "some version"
    build.toolkit, build.archs = toolkit, ["sm_80", "sm_90a", "compute_80"]
    monkeypatch.setattr(build, "_machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_knows", lambda flags: "-mamx-tile" not in flags)  # a compiler of some years ago
    jobs = {(job.source.name, job.label): " ".join(job.command) for job in [*build._cpu_jobs(), *build._cuda_jobs()]}
    isas = ("baseline", "avx2", "avx512")
    once = [("op.cpp", ""), ("other.cpp", ""), ("bind.cpp", ""), ("op.cu", ""), ("fast_sm90.cu", "")]
    dots = ("op.dots.cpp", "avx512_dots")
    assert jobs.keys() == {*once, dots, *(("op.simd.cpp", isa) for isa in isas)}
    assert "-mavx512bf16" in jobs[dots] and "-DFT_ISA=avx512_dots" in jobs[dots]
    assert "-DFT_WITH_DOTS" in jobs["op.cpp", ""] and "-DFT_WITH_TILES" not in jobs["op.cpp", ""]
    for isa in isas:
        assert f"-DFT_ISA={isa}" in jobs["op.simd.cpp", isa]
        assert ("-mavx" in jobs["op.simd.cpp", isa]) == (isa != "baseline")
    for name in ("op.cpp", "other.cpp"):
        assert "pybind11" not in jobs[name, ""] and "CUDA" not in jobs[name, ""]
    assert "-DFUSED_WITH_CUDA" in jobs["bind.cpp", ""] and "-DFT_WITH_SM90" in jobs["bind.cpp", ""]
    assert '-DFT_CUDA_ARCHS="sm_80;sm_90a;compute_80"' in jobs["bind.cpp", ""]
    assert re.findall(",code=([a-z0-9_]+)", jobs["op.cu", ""]) == ["sm_80", "sm_90a", "compute_80"]
    assert re.findall(",code=([a-z0-9_]+)", jobs["fast_sm90.cu", ""]) == ["sm_90a"]


def test_other_processors_get_one_version_of_each_kernel(csrc, monkeypatch):
    for name in ("op.simd.cpp", "op.dots.cpp", "op.tiles.cpp"):
        (csrc / "op" / name).touch()
    build = native.BuildNative(setuptools.Distribution())
    build.compiler_command, build.compiler_version, build.toolkit, build.archs = ["g++"], "some version", None, []
    monkeypatch.setattr(build, "_machine", lambda: "aarch64")
    labels = [job.label for job in build._cpu_jobs() if job.source.name.startswith("op.") and job.label]
    assert labels == ["baseline"]
