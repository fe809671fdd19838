"""Comparing what the two ways of a call give; the ways are the fixtures of conftest.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fused_transformer.kernels._dispatch import Op


def forbid_the_long_way(patch: pytest.MonkeyPatch, *ways: str) -> None:
    """From now on no backend may be chosen ("pick"), or asked for by a backward pass ("on"); default: neither."""
    for way in ways or ("pick", "on"):
        patch.setattr(Op, way, lambda op, *_: pytest.fail(f"{op.name} went the long way"))


def integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def tensors_of(result) -> tuple[Tensor, ...]:
    return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x is not None)


def assert_same(got, expected, rounded: bool = False) -> None:
    for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
        assert a.requires_grad == b.requires_grad and a.is_inference() == b.is_inference()
        rounding = {"rtol": 1e-6, "atol": 1e-7} if a.dtype == torch.float32 else {"rtol": 2**-7, "atol": 0}
        assert_close(a, b, **(rounding if rounded else {"rtol": 0, "atol": 0}), equal_nan=True)
