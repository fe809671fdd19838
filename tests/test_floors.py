"""Imports go down only: transformer -> kernels -> op -> backend -> kernels/_* -> _native -> _C; csrc knows no torch.

Also what keeps the tree readable and portable: short files, the same word for an op on every floor, and no path or
host name of somebody's machine.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "fused_transformer.kernels"
FOLDERS = {"kernels": KERNELS, "transformer": "fused_transformer"}
# Ops that are made of others: they use the others' public functions, and headers.
COMPOSED = {
    "decoder_step": {"decode_attention", "embedding", "layer_norm", "linear", "log_softmax_top_k"},
    "linear_argmax": {"linear"},
    "linear_cross_entropy": {"cross_entropy"},
}
# What every op stands on, and the model's own parts too: no op, and public all the same.
SHARED = {f"{KERNELS}.beams", f"{KERNELS}.matmul", f"{KERNELS}.memory"}
NATIVE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
LONGEST = 400
SOURCES = ("_build", "bench", "csrc", "kernels", "tests", "transformer")


WITH_TORCH = "with_torch"  # of csrc: a module of its own, which kernels/_node.py does without where it is not there


def files(*folders: str, suffixes: set[str]) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *[part for part in rest if part != "__init__"]])


PYTHON = {module_name(path): path for path in files("kernels", "transformer", suffixes={".py"})}
OPS = sorted(
    name for name, path in PYTHON.items() if path.parent.parent == ROOT / "kernels" and path.stem == "__init__"
)


def imported(module: str) -> set[str]:
    """The modules of this package that `module` imports, wherever in its text."""
    path = PYTHON[module]
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # `from package import name` imports a module only where there is one of that name
            known = name in PYTHON or name == f"{KERNELS}._C"
            found.add(name if known else name.rpartition(".")[0])
    return {name for name in found if name.split(".")[0] == "fused_transformer"}


def floor(module: str) -> int:
    if not module.startswith(KERNELS):
        return 6
    names = module.removeprefix(KERNELS).strip(".").split(".")
    if names == [""]:
        return 5
    if module in OPS:
        return 4
    if len(names) == 2:
        return 4 if names[0] in COMPOSED else 3  # a backend, or what an op's backends share
    return {"_C": 0, "_native": 1}.get(names[0], 2)


def test_the_floors_of_some_modules():
    expected = {"fused_transformer": 6, KERNELS: 5, f"{KERNELS}.attention": 4, f"{KERNELS}.attention.reference": 3}
    expected |= {f"{KERNELS}._dispatch": 2, f"{KERNELS}._native": 1, f"{KERNELS}._C": 0}
    assert {name: floor(name) for name in expected} == expected
    assert f"{KERNELS}.attention" in imported(KERNELS)
    assert f"{KERNELS}._C" in imported(f"{KERNELS}._native")


@pytest.mark.parametrize("module", PYTHON)
def test_imports_go_down_only(module):
    for name in imported(module):
        assert floor(name) <= floor(module), f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("module", [name for name in PYTHON if floor(name) in (3, 4)])
def test_an_op_keeps_out_of_other_ops_modules(module):
    op = module if module in OPS else module.rpartition(".")[0]
    for name in imported(module):
        assert floor(name) != 3 or name.startswith(f"{op}."), f"{module} imports {name}, which is another op's own"


# info is let off: its subject is what the lower floors are
@pytest.mark.parametrize("module", [name for name in PYTHON if floor(name) == 6 and name != "fused_transformer.info"])
def test_the_model_uses_public_ops_alone(module):
    for name in imported(module):
        assert floor(name) >= 4 or name in SHARED, f"{module} imports {name}: use the op's public function"


@pytest.mark.parametrize("module", [name for name in PYTHON if name != f"{KERNELS}._native"])
def test_only_native_touches_the_extension(module):
    assert f"{KERNELS}._C" not in imported(module)


@pytest.mark.parametrize("path", files("csrc", suffixes=NATIVE_SUFFIXES), ids=short)
def test_native_code_includes_its_own_floor_or_below(path):
    own = path.relative_to(ROOT / "csrc").parts[0]
    for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.MULTILINE):
        of_torch = re.match(r"(torch|ATen|c10)/", name)
        assert own == WITH_TORCH or not of_torch, f"{name}: the native floor knows no torch but in {WITH_TORCH}/"
        if kind == '"':
            target = next(p for p in (path.parent / name, ROOT / "csrc" / name) if p.is_file())
            folder = target.resolve().relative_to(ROOT / "csrc").parts[0]
            public = folder in COMPOSED.get(own, ()) and target.name == f"{folder}.h"
            assert public or folder in (own, "common"), f"{name}: an op includes its own folder and common/ alone"
        elif not path.name.startswith("bind") and own != WITH_TORCH:
            assert not re.match(r"pybind11/|Python\.h", name), f"{name}: Python is known to bind*.cpp alone"


def test_one_word_per_op():
    names = {name.rpartition(".")[2] for name in OPS}
    native = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common", WITH_TORCH}
    assert native <= names, f"csrc has folders that are no op: {native - names}"
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    for op in native:
        assert (ROOT / "csrc" / op / "bind.cpp").exists()
        assert f"fused::register_{op}(m);" in bindings, f"csrc/bindings.cpp does not register {op}"
    for op in names:
        assert list((ROOT / "tests" / "kernels").glob(f"test_{op}*.py")), f"{op} has no test of its own"


@pytest.mark.parametrize("path", files(*SOURCES, suffixes=NATIVE_SUFFIXES | {".py", ".sh"}), ids=short)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_the_tree_names_no_machine_and_no_registry():
    # written in pieces, so that this file does not name them either
    folders = "|".join(["work", "root", "home", "tmp", "Users"])
    hosts = "|".join(["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "npm" + "js", "deb" + "ian.org"])
    banned = re.compile(rf"(?<![\w.~}}])/(?:{folders})/\w|{hosts}")
    texts = [
        *files(*SOURCES, ".github", ".ci", suffixes=NATIVE_SUFFIXES | {".py", ".sh", ".yml", ".yaml", ".json", ""})
    ]
    texts += [p for p in ROOT.iterdir() if p.suffix in {".md", ".toml", ".txt", ".py", ".in"} or p.name == "Makefile"]
    problems = []
    for path in texts:
        if path.is_file():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if banned.search(line):
                    problems.append(f"{short(path)}:{number}: {line.strip()[:100]}")
    assert not problems, "\n".join(problems)
