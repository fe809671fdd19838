"""_build/requirements.py: what `make lint` installs without compiling the package."""

from __future__ import annotations

import importlib.util
import re

import pytest

from bench.report import ROOT


@pytest.fixture(scope="module")
def requirements():
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "_build" / "requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.requirements


def test_extras_of_extras_are_found_and_the_package_itself_is_not(requirements):
    names = [re.split(r"[<>=\[]", line)[0] for line in requirements(["dev"])]
    assert {"torch", "ruff", "mypy", "pytest", "pytest-benchmark", "hypothesis", "matplotlib", "sentencepiece"} <= {
        *names
    }
    assert "fused-transformer" not in names and len(names) == len({*names})


def test_an_extra_that_is_not_there_is_named(requirements):
    assert requirements([]) == ["torch>=2.9"]
    with pytest.raises(SystemExit, match="there is no extra 'gpu'"):
        requirements(["gpu"])
