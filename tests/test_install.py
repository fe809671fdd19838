"""The wheel and the sdist, as a user gets them: built, installed into an environment of their own, run there.

No network: what the build needs is in this environment (`make test` sees to that), torch is shared with it, and
objects already compiled are reused, so that these take seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Of the C++ runtime and the system; neither torch's nor CUDA's.
LIBRARIES = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64", "libc", "libm", "libdl", "librt", "libpthread"}
LIBRARIES |= {"libstdc++", "libgcc_s", "libgomp"}
TRY = """
import torch, fused_transformer
from fused_transformer.kernels import attention, use_backend
q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
with use_backend("cpu"):
    torch.testing.assert_close(attention(q, k, v, causal="top_left"), expected)
print(fused_transformer.__file__)
"""
NODE = """
import torch
from fused_transformer.kernels import _node, layer_norm
print(layer_norm(torch.randn(3, 8, requires_grad=True)).grad_fn.name(), _node.WHY_NONE)
"""


def run(*command, cwd=None, check=True, **environment) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_", "COV"))}
    text = [str(part) for part in command]
    done = subprocess.run(text, cwd=cwd, env=env | environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def build_wheel(source: Path, target: Path, check=True, **environment) -> str:
    options = ("--no-index", "--no-build-isolation", "--no-deps", "--verbose", "--wheel-dir", target)
    return run(sys.executable, "-m", "pip", "wheel", *options, source, check=check, **environment)


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info/RECORD" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build_wheel(ROOT, folder)
    (path,) = folder.glob("*.whl")
    return path


def environment(home: Path, wheel: Path) -> Path:
    """The Python of an environment that holds the wheel, and sees the torch of this one."""
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python3*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("fresh"), wheel)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_source(wheel):
    names = names_in(wheel)
    modules = {
        "/".join(["fused_transformer", *prefix, *path.relative_to(ROOT / folder).parts])
        for folder, prefix in (("transformer", []), ("kernels", ["kernels"]))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules <= names, modules - names
    data = {"fused_transformer/py.typed", *(f"fused_transformer/show/heads.{kind}" for kind in ("html", "css", "js"))}
    assert data <= names, data - names
    rest = {name for name in names - modules - data if ".dist-info/" not in name}
    assert sorted(name.split(".")[0] for name in rest) == [f"fused_transformer/kernels/{x}" for x in ("_C", "_torch")]


def test_the_wheel_runs_in_an_environment_of_its_own(installed, tmp_path):
    printed = run(installed, "-W", "error", "-c", TRY, cwd=tmp_path)
    assert Path(printed.splitlines()[-1]).is_relative_to(installed.parents[1])


def test_info_runs_there(installed, tmp_path):
    printed = run(installed, "-m", "fused_transformer", "info", cwd=tmp_path)
    assert "attention" in printed
    assert "cpu kernels        none" not in printed
    assert run(installed.with_name("fused-transformer"), "info", cwd=tmp_path) == printed


def test_the_extension_links_neither_torch_nor_cuda(installed):
    (extension,) = installed.parents[1].glob("lib/python3*/site-packages/fused_transformer/kernels/_C.*.so")
    linked = {line.split()[0].rpartition("/")[2].partition(".so")[0] for line in run("ldd", extension).splitlines()}
    assert "libgomp" in linked  # torch's own thread pool: it brings a library of this name
    assert linked <= LIBRARIES, f"unexpected: {linked - LIBRARIES}"


def test_the_extension_shows_its_init_function_and_nothing_else(installed):
    (extension,) = installed.parents[1].glob("lib/python3*/site-packages/fused_transformer/kernels/_C.*.so")
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", extension).splitlines()]
    assert exported == ["PyInit__C"]


def test_nodes_are_of_the_torch_that_is_there(installed, tmp_path):
    (module,) = installed.parents[1].glob("lib/python3*/site-packages/fused_transformer/kernels/_torch.*.so")
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__torch"]
    assert run(installed, "-c", NODE, cwd=tmp_path).split() == ["FusedLayerNormBackward", "None"]


def test_a_wheel_without_nodes_runs_by_way_of_python(tmp_path):
    printed = build_wheel(ROOT, tmp_path, FUSED_TRANSFORMER_NODES="0", FUSED_TRANSFORMER_CUDA="0")
    assert "NO AUTOGRAD NODES: FUSED_TRANSFORMER_NODES=0 asks for none" in printed
    (path,) = tmp_path.glob("*.whl")
    assert not any("/_torch" in name for name in names_in(path))
    printed = run(environment(tmp_path / "home", path), "-c", NODE, cwd=tmp_path)
    assert printed.split(maxsplit=1) == ["_LayerNormBackward", "the install compiled none, and said why\n"]


def test_the_sdist_holds_all_that_the_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    for folder in ("csrc", "_build", "kernels", "transformer", "tests"):
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))
        needed |= {str(path.relative_to(ROOT)) for path in found}
    assert needed <= names, needed - names
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []


def test_the_sdist_compiles_to_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = tmp_path.glob("fused_transformer-*")
    build_wheel(source, tmp_path, FUSED_TRANSFORMER_OBJECTS=str(ROOT / "build" / "objects"))
    (other,) = tmp_path.glob("*.whl")
    assert names_in(other) == names_in(wheel)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"FUSED_TRANSFORMER_CUDA": "0"}, "no CUDA kernels, as FUSED_TRANSFORMER_CUDA=0 asks"),
        ({"CUDA_HOME": "/nowhere"}, "NO CUDA KERNELS: no toolkit found in CUDA_HOME=/nowhere"),
    ],
)
def test_the_build_says_what_it_compiled(tmp_path, setting, said):
    printed = build_wheel(ROOT, tmp_path, **setting)
    assert "fused-transformer: CPU kernels for baseline" in printed
    assert f"fused-transformer: {said}" in printed
    assert len(list(tmp_path.glob("*.whl"))) == 1


def test_cuda_demanded_without_a_toolkit_is_an_error_that_says_what_to_do(tmp_path):
    printed = build_wheel(ROOT, tmp_path, check=False, FUSED_TRANSFORMER_CUDA="1", CUDA_HOME="/nowhere")
    assert "FUSED_TRANSFORMER_CUDA=1, but no CUDA toolkit" in printed
    assert "searched: CUDA_HOME=/nowhere" in printed
    assert list(tmp_path.glob("*.whl")) == []
