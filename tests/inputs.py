"""Inputs of the op tests: dtypes with short ids, random tensors in awkward layouts, and running on a backend.

@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("case", ROW_CASES, ids=case_id)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", op.order)      # a new backend is tested the day its file appears
def test_matches_the_reference(backend, case, dtype, layout, device):
    x = LAYOUTS[layout](normal(case["rows"], case["cols"], dtype=dtype, device=device, mean=case["mean"]))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_transformer.kernels import use_backend
from fused_transformer.kernels._dispatch import Op
from tests import emulated

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SHORT = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def dtype_id(dtype: torch.dtype) -> str:
    """f32, bf16, f16, f64; other dtypes by their own name."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


class Case(dict):
    """A named set of parameters: Case("prime", rows=7, cols=1021)["rows"] is 7."""

    def __init__(self, name: str, **parameters: Any):
        super().__init__(parameters)
        self.name = name


def case_id(case: Case) -> str:
    return case.name


# The shapes every row-wise op is tested with. `mean` is the mean of the input.
ROW_CASES = (
    Case("one", rows=1, cols=1, mean=0.0),
    Case("prime", rows=7, cols=1021, mean=0.0),
    Case("below_a_vector", rows=5, cols=15, mean=0.0),
    Case("one_vector", rows=5, cols=16, mean=0.0),
    Case("above_a_vector", rows=5, cols=17, mean=0.0),
    Case("odd_vector", rows=33, cols=131, mean=0.0),
    Case("wide", rows=3, cols=8200, mean=0.0),
    Case("tall", rows=1031, cols=24, mean=0.0),
    Case("offset", rows=9, cols=512, mean=1000.0),
    Case("empty", rows=0, cols=64, mean=0.0),
)


def normal(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Normal numbers drawn in float64 on the CPU, so that every dtype and device sees the same ones, rounded."""
    return (torch.randn(shape, dtype=torch.float64) * std + mean).to(dtype).to(device)


def as_strided(x: Tensor) -> Tensor:
    """The same values as a slice of a wider tensor; what lies between the rows is NaN."""
    if x.dim() == 0:
        return x
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype, device=x.device)
    out = wide[..., 2:-3]
    out.copy_(x)
    return out


def as_offset(x: Tensor) -> Tensor:
    """The same values, one element off the allocation's alignment."""
    flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    out = flat[1:].view(x.shape)
    out.copy_(x)
    return out


def as_transposed(x: Tensor) -> Tensor:
    """The same values with the last two axes swapped in memory: the last axis is not contiguous."""
    return x if x.dim() < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def as_expanded(x: Tensor) -> Tensor:
    """The first slice repeated along the first axis with stride 0 (other values than x's)."""
    return x if x.dim() < 2 or x.shape[0] == 0 else x[:1].expand_as(x)


LAYOUTS = {
    "dense": lambda x: x,
    "strided": as_strided,
    "offset": as_offset,
    "transposed": as_transposed,
    "expanded": as_expanded,
}


def skip_if_refused(op: Op, backend: str, *args) -> None:
    """Skip the test, with the backend's own sentence, if it does not take the arguments of its forward()."""
    with emulated.wanted():
        why = op.why_not(backend, *args)
    if why is not None:
        pytest.skip(f"{op.name}, {backend}: {why}")


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """use_backend(backend), where a refusal skips the test with the backend's sentence. "cuda" without a device is the
    emulator of tests/emulated.py."""
    try:
        with use_backend(backend), emulated.wanted():
            yield
    except NotImplementedError as refusal:
        first, _, rest = str(refusal).partition("\n")
        if "no backend takes these arguments" not in first:
            raise
        pytest.skip(f"{first.partition(':')[0]}, {rest.strip()}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch and the CPU kernels run on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
