"""The two ways of a call on CPU tensors: direct (csrc/common/bind_direct.h), and the long way round."""

from __future__ import annotations

import importlib

import pytest

from tests.kernels.two_ways import forbid_the_long_way


@pytest.fixture
def indirect(monkeypatch):
    """Runs a function with every call going the long way round."""

    def run(function, *args, **kwargs):
        module = importlib.import_module(function.__module__)
        with monkeypatch.context() as patch:
            for name in ("_direct_call", "_direct_is_ready"):
                patch.setattr(module, name, lambda *_: None, raising=False)
            return function(*args, **kwargs)

    return run


@pytest.fixture
def direct(monkeypatch):
    """Runs a function that must not choose a backend, which the long way does."""

    def run(function, **kwargs):
        with monkeypatch.context() as patch:
            forbid_the_long_way(patch, "pick")
            return function(**kwargs)

    return run
