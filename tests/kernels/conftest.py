"""The two ways of a call on CPU tensors: direct (csrc/common/bind_direct.h), and the long way round."""

from __future__ import annotations

import importlib

import pytest

from fused_transformer.kernels import _node
from tests.kernels.two_ways import forbid_the_long_way


@pytest.fixture
def indirect(monkeypatch):
    """Runs a function with every call going the long way round."""

    def run(function, *args, **kwargs):
        module = importlib.import_module(function.__module__)
        with monkeypatch.context() as patch:
            for owner in (module, getattr(module, "differentiated", module)):
                for name in ("direct_call", "_direct_call", "_direct_is_ready"):
                    if hasattr(owner, name):
                        patch.setattr(owner, name, lambda *_: None)
            return function(*args, **kwargs)

    return run


@pytest.fixture(params=["node", "function"])
def recorded(request, monkeypatch):
    """How a call that wants a gradient is made known to autograd: by a node in C++, or the op's autograd.Function."""
    if request.param == "function":
        monkeypatch.setattr(_node, "KEEP", False)
    elif _node.WHY_NONE is not None:
        pytest.skip(f"no nodes: {_node.WHY_NONE}")
    return request.param


@pytest.fixture
def direct(monkeypatch):
    """Runs a function that must not choose a backend, which the long way does."""

    def run(function, **kwargs):
        with monkeypatch.context() as patch:
            forbid_the_long_way(patch, "pick")
            return function(**kwargs)

    return run
