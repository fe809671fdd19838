"""The Noam schedule against the paper's formula and figures."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.schedule import NoamLR


def optimizer_of_two_groups():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    return torch.optim.Adam(groups, lr=123.0)


def rates(schedule, optimizer, steps):
    used = []
    for _ in range(steps):
        assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"]
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def test_the_formula():
    optimizer = optimizer_of_two_groups()
    used = rates(NoamLR(optimizer, d_model=64, warmup_steps=5, factor=2.0), optimizer, 12)
    expected = [2.0 * 64**-0.5 * min(step**-0.5, step * 5**-1.5) for step in range(1, 13)]
    assert used == pytest.approx(expected, rel=1e-12)
    assert max(used) == used[4]


def test_the_papers_highest_rate():
    schedule = NoamLR(optimizer_of_two_groups(), d_model=512)
    assert schedule.rate(4000) == pytest.approx(6.9877e-4, rel=1e-4)  # 512^-0.5 · 4000^-0.5
    assert schedule.rate(100_000) == pytest.approx(1.3975e-4, rel=1e-4)


def test_a_restored_schedule_goes_on():
    optimizer = optimizer_of_two_groups()
    schedule = NoamLR(optimizer, d_model=16, warmup_steps=4)
    whole = rates(schedule, optimizer, 9)

    optimizer = optimizer_of_two_groups()
    schedule = NoamLR(optimizer, d_model=16, warmup_steps=4)
    first = rates(schedule, optimizer, 3)
    state, optimizer_state = schedule.state_dict(), optimizer.state_dict()
    optimizer = optimizer_of_two_groups()
    schedule = NoamLR(optimizer, d_model=16, warmup_steps=4)
    optimizer.load_state_dict(optimizer_state)
    schedule.load_state_dict(state)
    assert first + rates(schedule, optimizer, 6) == whole


@pytest.mark.parametrize("name", ["d_model", "warmup_steps", "factor"])
def test_refused_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        NoamLR(optimizer_of_two_groups(), **{"d_model": 8, name: 0})
    with pytest.raises(ValueError, match=f"{name} must be finite, got inf"):
        NoamLR(optimizer_of_two_groups(), **{"d_model": 8, name: float("inf")})
