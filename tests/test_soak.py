"""tests/soak.py notices a leak, and finds none in a few steps of training."""

from __future__ import annotations

import pytest
import torch

from tests import soak


def test_a_leak_is_noticed():
    kept = []

    def step():
        kept.append(torch.ones(10_000_000))  # 40 MB: what is smaller may lie in memory that was freed before
        return 0.0

    assert soak.soak(step, 10) > soak.GROWTH


@pytest.mark.slow
def test_training_keeps_its_memory():
    trainer = soak.make_trainer()
    for _ in range(20):
        trainer.train_step()
    assert soak.soak(trainer.train_step, 100) < 3 * soak.GROWTH  # few steps: buffers of new sizes still come
