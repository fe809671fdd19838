"""Fixtures of the model's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_thread():
    """For tiny models, which two threads make slower, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
