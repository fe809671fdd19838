"""A pytest plugin for PyTorch's own test files: torch.nn's classes are ours, and each test's outcome is written down.

python -m pytest -p tests.transformer.torch_rebound nn/test_multihead_attention.py    (see test_torch_files.py)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch.nn import modules
from torch.nn.modules import activation, normalization, transformer

from fused_transformer import nn as ours

for _name in ours.__all__:
    for _module in (torch.nn, modules, activation, normalization, transformer):
        if hasattr(_module, _name):
            setattr(_module, _name, getattr(ours, _name))

OUTCOMES: dict[str, str] = {}


def pytest_runtest_logreport(report):
    name = report.nodeid.rpartition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[name] = "waited for" if hasattr(report, "wasxfail") else report.outcome


def pytest_sessionfinish():
    if "OUTCOMES" in os.environ:
        Path(os.environ["OUTCOMES"]).write_text(json.dumps(OUTCOMES))
