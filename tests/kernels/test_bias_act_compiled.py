"""bias_act as an operator: under torch.compile and torch.func and for meta tensors it is what it is in eager."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import bias_act
from fused_transformer.kernels.bias_act import ACTIVATIONS, op
from tests.inputs import dtype_id, normal, running_on
from tests.oracle import run_with_gradients

BACKENDS = op.order
SEED = torch.tensor([2**50 + 99])


def make(dtype=torch.float32, device="cpu"):
    return {"x": normal(3, 4, 20, dtype=dtype, device=device), "bias": normal(20, dtype=dtype, device=device)}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_one_node_with_eagers_numbers(backend, activation, dropout_p, device):
    tensors, seed = make(device=device), SEED.to(device)

    def function(x, bias):
        return bias_act(x * 2, bias, activation=activation, dropout_p=dropout_p, seed=seed) + 1

    with running_on(backend):
        eager = run_with_gradients(function, tensors)
        compiled = run_with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)
    torch.testing.assert_close(compiled, eager)


def test_a_compiled_call_draws_its_own_mask():
    tensors = make()
    compiled = torch.compile(lambda x, bias: bias_act(x, bias, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    first, second = (compiled(*tensors.values()) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_operator_keeps_torchs_rules(activation, dtype, bias):
    x, b = make(dtype).values()
    b = b.requires_grad_() if bias else None
    for layout in (x, x.transpose(0, 1), x[..., :1].expand_as(x)):
        arguments = (layout.detach().requires_grad_(), b, SEED, activation, 0.4)
        torch.library.opcheck(torch.ops.fused_transformer.bias_act.default, arguments)
    for wanted in ((True, False), (False, True), (True, True)):
        arguments = (torch.ones_like(x), x, None if b is None else b.detach(), SEED, activation, 0.4, *wanted)
        torch.library.opcheck(torch.ops.fused_transformer.bias_act_backward.default, arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torch_func_gives_what_autograd_gives(activation):
    x, bias = make().values()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(bias_act(leaf, bias, activation=activation).square().sum(), leaf)
    got = torch.func.grad(lambda x: bias_act(x, bias, activation=activation).square().sum())(x)
    torch.testing.assert_close(got, expected)
    got = torch.func.vmap(lambda x: bias_act(x, bias, activation=activation))(x)
    torch.testing.assert_close(got, bias_act(x, bias, activation=activation))


def test_meta_tensors_have_the_shapes():
    x = torch.empty(3, 4, 20, dtype=torch.bfloat16, device="meta", requires_grad=True)
    bias = torch.empty(20, device="meta", requires_grad=True)
    y = bias_act(x, bias, activation="gelu", dropout_p=0.1)
    y.sum().backward()
    assert (y.shape, y.dtype) == (x.shape, x.dtype) and x.grad.shape == x.shape
    assert bias.grad.shape == (20,) and bias.grad.dtype == torch.float32
