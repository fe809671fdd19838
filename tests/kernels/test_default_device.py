"""torch.device("...") as a context, or torch.set_default_device: an op's tensors say where it runs, and where its
results and its working memory lie. Memory on another device's addresses would end the process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.calls import CALLS, DIFFERENTIABLE


def outputs(call) -> tuple[Tensor, ...]:
    result = call.run()
    return tuple(x for x in (result if isinstance(result, tuple) else (result,)) if x is not None)


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_default_device(name):
    torch.manual_seed(0)
    call = CALLS[name]("cpu")
    expected = outputs(call)
    with torch.device("meta"):
        got = outputs(call)
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_do_not_depend_on_the_default_device(name):
    torch.manual_seed(0)
    call = CALLS[name]("cpu")
    leaves = [x.requires_grad_() for x in call.tensors.values() if x.is_floating_point()]
    expected = torch.autograd.grad(outputs(call)[0].square().sum(), leaves)
    with torch.device("meta"):
        got = torch.autograd.grad(outputs(call)[0].square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)
