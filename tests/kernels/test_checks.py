"""Errors about arguments: the type, and words in which the caller finds the argument."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import _checks

CPU = torch.device("cpu")


def test_require():
    _checks.require(True, "unused")
    with pytest.raises(ValueError, match=r"^k and v must agree$"):
        _checks.require(False, "k and v must agree")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_four_floats_and_None_pass(dtype):
    _checks.require_float(q=torch.empty(2, dtype=dtype), bias=None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^k must be float32, float16, bfloat16 or float64, got {name}$"):
        _checks.require_float(q=torch.empty(2), k=torch.empty(2, dtype=dtype))


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"^weight must be a torch\.Tensor, got list$"):
        _checks.require_float(x=torch.empty(2), weight=[1.0])


def test_tensors_must_agree():
    x, half = torch.empty(2), torch.empty(2, dtype=torch.float16)
    _checks.require_same("dtype", x=x, weight=x, bias=None)
    with pytest.raises(ValueError, match=r"^all tensors must have the same dtype, got x: float32, weight: float16$"):
        _checks.require_same("dtype", x=x, weight=half, bias=None)
    with pytest.raises(ValueError, match=r"^all tensors must have the same device, got x: cpu, weight: meta$"):
        _checks.require_same("device", x=x, weight=torch.empty(2, device="meta"))


def test_a_shape_must_be_exact():
    _checks.require_shape("weight", torch.empty(3, 4), (3, 4))
    _checks.require_shape("weight", None, (3, 4))
    with pytest.raises(ValueError, match=r"^weight must have shape \(3, 4\), got \(4, 3\)$"):
        _checks.require_shape("weight", torch.empty(4, 3), (3, 4))
    with pytest.raises(ValueError, match="weight must have shape"):
        _checks.require_shape("weight", torch.empty(1, 3, 4), (3, 4))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
def test_dropout_takes_a_probability_and_a_seed(dropout_p):
    _checks.require_dropout(dropout_p, None, CPU)
    _checks.require_dropout(dropout_p, torch.tensor([7]), CPU)
    _checks.require_dropout(dropout_p, torch.tensor(7), CPU)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.1, float("nan"), float("inf")])
def test_dropout_refuses_what_is_no_probability(dropout_p):
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1, got"):
        _checks.require_dropout(dropout_p, None, CPU)


@pytest.mark.parametrize("seed", [7, torch.tensor([7], dtype=torch.int32), torch.tensor([7, 8]), torch.tensor([7.0])])
def test_dropout_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match=r"^seed must be a torch\.int64 tensor with one element$"):
        _checks.require_dropout(0.1, seed, CPU)


def test_the_seed_must_be_where_the_tensors_are():
    with pytest.raises(ValueError, match=r"^seed must be on cpu, as the other tensors are, got meta$"):
        _checks.require_dropout(0.1, torch.empty(1, dtype=torch.int64, device="meta"), CPU)


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.zeros(3, 8)[:, :4], torch.zeros(3, 4).expand(2, 3, 4)])
def test_a_dense_last_axis_is_left_alone(x):
    assert _checks.dense_last(x) is x


@pytest.mark.parametrize("x", [torch.randn(3, 4).t(), torch.randn(3, 8)[:, ::2], torch.randn(3, 1).expand(3, 4)])
def test_any_other_last_axis_is_copied(x):
    copy = _checks.dense_last(x)
    assert copy.stride(-1) == 1
    assert torch.equal(copy, x)


def test_a_last_axis_of_one_is_dense_whatever_its_stride():
    x = torch.zeros(3, 8)[:, ::8]
    assert _checks.dense_last(x) is x
