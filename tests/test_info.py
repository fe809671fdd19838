"""`python -m fused_transformer`: the report of info, and commands whose libraries are missing."""

from __future__ import annotations

import sys

import pytest
import torch

from fused_transformer import __main__, info
from fused_transformer.kernels import BACKENDS, OPS, _native


def run(capsys, *arguments):
    status = __main__.main(arguments)
    return status, capsys.readouterr()


def test_info_states_versions_and_kernels(capsys):
    status, printed = run(capsys, "info")
    assert status == 0
    facts = dict(line.split(None, 1) for line in printed.out.splitlines()[:4])
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["fused-transformer"][0].isdigit()
    assert f"{_native.library().isa()}, {torch.get_num_threads()} threads" in printed.out


def test_the_table_says_yes_or_why_not_for_every_op_and_backend(capsys):
    lines = run(capsys, "info")[1].out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split() == ["op", *BACKENDS])
    rows = {line.split()[0]: line.split()[1:] for line in lines[header + 1 : header + 1 + len(OPS)]}
    assert rows.keys() == OPS.keys()
    for name, row in rows.items():
        for backend, word in zip(BACKENDS, row, strict=True):
            why = info.unavailable(name, backend)
            assert word == ("no" if why else "yes")
            if why:
                line = next(x for x in lines if x.startswith(f"no {backend} for ") and x.endswith(f": {why}"))
                assert name in line


def test_cpu_and_reference_serve_every_op_here():
    assert {name for name in OPS if info.unavailable(name, "reference")} == set()
    assert {name for name in OPS if info.unavailable(name, "cpu")} == set()


def test_a_gpu_backend_without_a_gpu_is_no_yes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in OPS:
        assert info.unavailable(name, "cuda")
        assert info.unavailable(name, "triton")


def test_an_order_without_a_backend_says_so(monkeypatch):
    name = next(iter(OPS))
    monkeypatch.setattr(OPS[name], "order", ("cpu", "reference"))
    assert info.unavailable(name, "triton") == "the op has no such backend"


def test_a_missing_extension_is_reported_and_no_crash(capsys, monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_missing", "the compiled extension is missing (no file)")
    status, printed = run(capsys, "info")
    assert status == 0
    assert "cpu kernels        none: the compiled extension is missing (no file)" in printed.out


@pytest.mark.parametrize(
    ("archs", "expected"), [("", "none: this build has no CUDA"), ("sm_80;compute_80", "sm_80, PTX")]
)
def test_the_compiled_architectures(monkeypatch, archs, expected):
    class Library:
        cuda_archs = archs

    monkeypatch.setattr(_native, "_C", Library)
    assert expected in info._cuda()


@pytest.mark.parametrize("command", ["train", "translate"])
@pytest.mark.parametrize("library", __main__.TEXT_LIBRARIES)
def test_a_missing_library_names_the_extra(capsys, monkeypatch, command, library):
    def import_module(name):
        raise ModuleNotFoundError(f"No module named '{library}'", name=f"{library}.deep")

    monkeypatch.setattr(__main__, "import_module", import_module)
    status, printed = run(capsys, command)
    assert status == 1
    assert printed.err == f"{command} needs {library}, which is not installed: pip install 'fused-transformer[text]'\n"


def test_other_failed_imports_are_not_hidden(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr(__main__, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        __main__.main(["train"])


def test_arguments_go_to_the_command_as_they_are(monkeypatch):
    seen = []

    class Module:
        @staticmethod
        def main(arguments):
            seen.append(arguments)

    monkeypatch.setattr(__main__, "import_module", lambda name: Module)
    assert __main__.main(["translate", "--beam-size", "4", "--help"]) == 0
    assert seen == [["--beam-size", "4", "--help"]]


@pytest.mark.parametrize("arguments", [[], ["infer"]])
def test_no_command_or_an_unknown_one_is_a_usage_error(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        __main__.main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m fused_transformer" in capsys.readouterr().err
