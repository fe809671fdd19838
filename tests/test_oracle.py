"""The oracle itself: it must fail where it should."""

from __future__ import annotations

import pytest
import torch

from tests.inputs import LAYOUTS, normal
from tests.oracle import assert_matches, run_with_gradients, ulp


def test_ulp_is_the_distance_to_the_next_number():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for value in (1.0, 1.5, 0.3, 1000.0, 6e-5):
            x = torch.tensor(value, dtype=dtype)
            step = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype)) - x
            assert ulp(x.item(), dtype) == step.double().item(), (dtype, value)


def test_a_close_result_passes_and_a_far_one_fails():
    exact = torch.randn(5, 7, dtype=torch.float64)
    naive = exact.float() + 1e-3
    assert_matches(exact.float() - 1.9e-3, exact, naive)
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_matches(exact.float() - 2.1e-3, exact, naive)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_never_pass_for_a_number(bad):
    exact = torch.randn(5, 7, dtype=torch.float64)
    got = exact.float()
    got[2, 3] = bad
    with pytest.raises(AssertionError, match="first at \\(2, 3\\)"):
        assert_matches(got, exact, exact.float())
    with pytest.raises(AssertionError, match="first at \\(2, 3\\)"):
        assert_matches(got, exact, got)  # not even if the naive result is as bad


def test_infinity_has_a_sign_and_numbers_do_not_pass_for_it():
    exact = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_matches(exact.float(), exact, exact.float())
    for wrong in (torch.inf, torch.nan, -3e38):
        with pytest.raises(AssertionError):
            assert_matches(torch.tensor([wrong, 1.0]), exact, exact.float())


def test_shapes_dtypes_and_names_must_agree():
    x = torch.randn(3, dtype=torch.float64)
    for got in (x.float()[:2], x.float()[None], x.half(), {"other": x.float()}, [x.float(), x.float()]):
        with pytest.raises(AssertionError):
            assert_matches(got, x, x.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_come_in_the_layouts_given(layout):
    x, w = LAYOUTS[layout](normal(4, 6)), normal(6)
    seen = {}

    def function(x, w, power):
        seen["stride"] = x.stride()
        return x**power * w

    results = run_with_gradients(function, {"x": x, "w": w}, power=2)
    assert seen["stride"] == x.stride()
    assert results.keys() == {"out", "dx", "dw"}
    upstream = results["dx"] / (2 * x * w)
    torch.testing.assert_close(results["dw"], (upstream * x**2).sum(0), rtol=1e-4, atol=1e-4)
    again = run_with_gradients(function, {"x": x, "w": w}, power=2)
    assert all(torch.equal(results[name], again[name]) for name in results)


def test_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()
