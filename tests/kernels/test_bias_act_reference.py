"""bias_act's first link of the chain of trust, its gradients one by one, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import _philox, bias_act, use_backend
from fused_transformer.kernels.bias_act import ACTIVATIONS, op
from tests.inputs import normal, running_on
from tests.oracle import assert_equal, run_with_gradients

BACKENDS = op.order
ROWS, COLS = 23, 71
SEED = torch.tensor([2**50 + 99])

# as the docstring writes them
FORMULAS = {
    "relu": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "gelu": lambda h: h / 2 * (1 + torch.erf(h / math.sqrt(2))),
    "gelu_tanh": lambda h: h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
}
TORCHS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}


def make(dtype=torch.float32, device="cpu"):
    return {"x": normal(ROWS, COLS, dtype=dtype, device=device), "bias": normal(COLS, dtype=dtype, device=device)}


def plain(x, bias=None, *, functions, activation, dropout_p=0.0, seed=None):
    y = functions[activation](x if bias is None else x + bias)
    if not dropout_p:
        return y
    return y * _philox.keep_rows(seed, dropout_p, y.numel() // y.shape[-1], y.shape[-1]).view(y.shape) / (1 - dropout_p)


# ---------------------------------------------------------------- torch in float64 <- the reference


@pytest.mark.parametrize("functions", [FORMULAS, TORCHS], ids=["formula", "torch"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_the_formula_and_torchs(activation, bias, dropout_p, functions):
    tensors = {"x": 3 * torch.randn(2, 5, 13, dtype=torch.float64)}
    if bias:
        tensors["bias"] = torch.randn(13, dtype=torch.float64)
    options = {"activation": activation, "dropout_p": dropout_p, "seed": SEED}
    with use_backend("reference"):
        got = run_with_gradients(bias_act, tensors, **options)
    expected = run_with_gradients(plain, tensors, functions=functions, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 7), (7,)))
    options = {"activation": activation, "dropout_p": 0.3, "seed": SEED}
    assert torch.autograd.gradcheck(lambda x, bias: bias_act(x, bias, **options), (x, bias))


def test_the_derivative_of_relu_at_0_is_0():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30], requires_grad=True)
    for backend in ("reference", "triton"):
        with running_on(backend):
            (dx,) = torch.autograd.grad(bias_act(x).sum(), x)
        assert_equal(dx, torch.tensor([0.0, 0.0, 1.0, 0.0]))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["x", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_is_the_one_computed_among_all(backend, activation, name, dropout_p, device):
    tensors = make(device=device)
    options = {"activation": activation, "dropout_p": dropout_p, "seed": SEED.to(device)}
    upstream = normal(ROWS, COLS, device=device)
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    alone = tensors | {name: tensors[name].clone().requires_grad_()}
    with running_on(backend):
        together = torch.autograd.grad(bias_act(**leaves, **options), leaves[name], upstream)
        gradient = torch.autograd.grad(bias_act(**alone, **options), alone[name], upstream)
    assert_equal(gradient, together)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_strides(backend, activation, device):
    leaves = [x.requires_grad_() for x in make(device=device).values()]
    with running_on(backend):
        y = bias_act(*leaves, activation=activation)
    base = normal(COLS, 2 * ROWS, device=device)
    for upstream in (base[:, ::2].t(), base[0, 0].expand(ROWS, COLS)):
        strided = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        dense = torch.autograd.grad(y, leaves, upstream.contiguous(), retain_graph=True)
        if backend == "reference":  # torch's own sums go by the layout
            torch.testing.assert_close(strided, dense)
        else:
            assert_equal(strided, dense)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_changing_a_saved_tensor_before_backward_is_an_error(activation):
    x = normal(3, 8).requires_grad_()
    hidden = x * 1.0
    y = bias_act(hidden, activation=activation)
    saved = y if activation == "relu" else hidden
    with torch.no_grad():
        saved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_relu_keeps_its_output_and_not_its_input():
    x = normal(3, 8).requires_grad_()
    saved: list = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bias_act(x, normal(8), dropout_p=0.5)
    assert len(saved) == 1 and saved[0].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_y_is_the_same_with_and_without_a_gradient_to_come(activation):
    for backend in ("reference", "triton"):
        tensors = make()
        options = {"activation": activation, "dropout_p": 0.1, "seed": SEED}
        with running_on(backend):
            plain = bias_act(**tensors, **options)
            trained = bias_act(**{n: x.requires_grad_() for n, x in tensors.items()}, **options)
        assert trained.requires_grad
        assert_equal(plain, trained.detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(activation):
    x = normal(3, 8).requires_grad_()
    for function in (torch.sum, lambda y: y.square().sum()):
        loss = function(bias_act(x, activation=activation))
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (loss + dx.square().sum()).backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
def test_a_forward_mode_derivative_is_an_error_and_not_a_wrong_number():
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(normal(3, 8), normal(3, 8))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            bias_act(x)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"x must have shape \(..., F\) with F >= 1, got \(\)", {"x": torch.tensor(1.0)}),
        (r"x must have shape .* got \(3, 0\)", {"x": torch.ones(3, 0)}),
        (r"x must be float32, float16, bfloat16 or float64, got int64", {"x": torch.ones(ROWS, COLS).long()}),
        (r"bias must have shape \(71,\), got \(70,\)", {"bias": torch.ones(COLS - 1)}),
        (r"bias must be float32 or, as x is, float32; got float16", {"bias": torch.ones(COLS).half()}),
        (r"must have the same device, got x: cpu, bias: meta", {"bias": torch.ones(COLS, device="meta")}),
        (r"activation must be one of 'relu', 'gelu', 'gelu_tanh', got 'tanh'", {"activation": "tanh"}),
        (r"activation must be one of .*, got None", {"activation": None}),
        (r"dropout_p must be between 0 and 1, got 1.5", {"dropout_p": 1.5}),
        (r"seed must be a torch.int64 tensor with one element", {"dropout_p": 0.5, "seed": torch.ones(1)}),
    ],
)
def test_a_wrong_argument_is_named(message, change):
    with pytest.raises(ValueError, match=message):
        bias_act(**{**make(), **change})


def test_what_is_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"bias must be a torch.Tensor, got float"):
        bias_act(torch.ones(2, 3), 1.0)


def test_a_forced_backend_that_cannot_says_why():
    with use_backend("cuda"), pytest.raises(NotImplementedError, match=r"bias_act: no backend .*\n  cuda: "):
        bias_act(torch.ones(2, 3))


def test_torch_compile_gives_what_eager_gives():
    tensors = make()
    compiled = torch.compile(lambda x, bias: bias_act(x * 2, bias, activation="gelu") + 1, backend="eager")
    assert_equal(compiled(*tensors.values()), bias_act(tensors["x"] * 2, tensors["bias"], activation="gelu") + 1)
