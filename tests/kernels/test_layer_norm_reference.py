"""Layer norm's first link of the chain of trust: torch.nn.functional in float64 <- the reference backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import (
    _philox,
    add_layer_norm_with_total,
    add_rms_norm_with_total,
    layer_norm,
    rms_norm,
    use_backend,
)
from tests.inputs import Case, case_id
from tests.oracle import run_with_gradients

DOUBLE = torch.float64
SEED = torch.tensor([-(2**52) - 12345])
CASES = (
    Case("one", shape=(1, 1)),
    Case("vector", shape=(7,)),
    Case("rows", shape=(5, 13)),
    Case("three_axes", shape=(2, 3, 8)),
    Case("no_rows", shape=(0, 8)),
    Case("no_weight", shape=(3, 9), absent=("weight",)),
    Case("no_bias", shape=(3, 9), absent=("bias",)),
    Case("no_parameter", shape=(3, 9), absent=("weight", "bias", "x_bias")),
    Case("a_large_eps", shape=(3, 9), eps=0.5),
    Case("offset", shape=(3, 64), mean=1000.0),
    Case("dropout", shape=(2, 3, 9), dropout_p=0.4),
    Case("dropout_alone", shape=(6, 9), dropout_p=0.4, absent=("x_bias",)),
)


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


def make(case, *names):
    shape, absent = case["shape"], case.get("absent", ())
    tensors = {
        name: torch.randn(shape if name in ("x", "residual") else shape[-1:], dtype=DOUBLE)
        for name in names
        if name not in absent
    }
    tensors["x"] += case.get("mean", 0.0)
    return tensors


def plain_total(x, residual, x_bias=None, dropout_p=0.0):
    total = x if x_bias is None else x + x_bias
    keep = _philox.keep_rows(SEED, dropout_p, total.numel() // total.shape[-1], total.shape[-1]).view(total.shape)
    return residual + (total * keep / (1 - dropout_p) if dropout_p else total)


def options_of(case):
    return {"dropout_p": case.get("dropout_p", 0.0), "seed": SEED if "dropout_p" in case else None}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_layer_norm_is_torchs(case):
    tensors, eps = make(case, "x", "weight", "bias"), case.get("eps", 1e-5)

    def plain(x, weight=None, bias=None):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    got = run_with_gradients(layer_norm, tensors, eps=eps)
    torch.testing.assert_close(got, run_with_gradients(plain, tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_rms_norm_is_torchs(case):
    tensors, eps = make(case, "x", "weight"), case.get("eps", 1e-5)

    def plain(x, weight=None):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    got = run_with_gradients(rms_norm, tensors, eps=eps)
    torch.testing.assert_close(got, run_with_gradients(plain, tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_fused_sum_is_the_one_written_out(case):
    tensors, eps = make(case, "x", "residual", "weight", "bias", "x_bias"), case.get("eps", 1e-5)

    def plain(x, residual, weight=None, bias=None, x_bias=None):
        total = plain_total(x, residual, x_bias, case.get("dropout_p", 0.0))
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total

    got = run_with_gradients(add_layer_norm_with_total, tensors, eps=eps, **options_of(case))
    torch.testing.assert_close(got, run_with_gradients(plain, tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_fused_sum_of_rms_norm_is_the_one_written_out(case):
    tensors, eps = make(case, "x", "residual", "weight", "x_bias"), case.get("eps", 1e-5)

    def plain(x, residual, weight=None, x_bias=None):
        total = plain_total(x, residual, x_bias, case.get("dropout_p", 0.0))
        return F.rms_norm(total, total.shape[-1:], weight, eps), total

    got = run_with_gradients(add_rms_norm_with_total, tensors, eps=eps, **options_of(case))
    torch.testing.assert_close(got, run_with_gradients(plain, tensors), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", [add_layer_norm_with_total, add_rms_norm_with_total])
def test_gradcheck(function):
    names = ["x", "residual", "weight", "x_bias"] + (["bias"] if function is add_layer_norm_with_total else [])
    tensors = make(Case("rows", shape=(3, 2, 7)), *names)
    leaves = [tensors[name].requires_grad_() for name in names]

    def call(*inputs):
        return function(**dict(zip(names, inputs, strict=True)), dropout_p=0.3, seed=SEED)

    assert torch.autograd.gradcheck(call, leaves)
