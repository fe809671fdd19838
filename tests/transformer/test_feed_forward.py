"""FeedForward on every backend: with the fused op where it has a kernel, with torch's own functions elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from fused_transformer import FeedForward
from fused_transformer.kernels import BACKENDS, _philox, bias_act, use_backend
from fused_transformer.kernels.bias_act import has_kernel, op
from fused_transformer.kernels.memory import LARGE_BYTES
from tests.oracle import assert_matches, in_float64, run_with_gradients

E, WIDE = 24, 100


def make(activation="relu", dropout=0.0):
    """A module, and its weights beside an input, all of them random."""
    module = FeedForward(E, WIDE, activation=activation, dropout=dropout)
    torch.nn.init.normal_(module.linear1.bias)
    return module, {"x": torch.randn(5, 7, E), **{k.replace(".", "_"): v for k, v in module.state_dict().items()}}


def call(module):
    names = {name.replace(".", "_"): name for name, _ in module.named_parameters()}

    def function(x, **weights):
        return functional_call(module, {names[name]: weight for name, weight in weights.items()}, (x,))

    return function


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_numbers(backend, activation):
    module, tensors = make(activation)
    naive, exact = (run_with_gradients(call(module), given) for given in (tensors, in_float64(tensors)))
    with use_backend(backend):
        got = run_with_gradients(call(module), tensors)
    assert_matches(got, exact, naive)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_dropout_is_drawn_as_the_op_draws_it(backend, activation):
    module, tensors = make(activation, dropout=0.25)
    x = tensors["x"]
    with use_backend(backend):
        if not has_kernel(x, activation):
            pytest.skip(f"{backend} takes no CPU tensors here")
        torch.manual_seed(3)
        got = module(x)
        torch.manual_seed(3)
        seed = _philox.new_seed(x.device)
        hidden = bias_act(module.linear1(x), activation=activation, dropout_p=0.25, seed=seed)
        torch.testing.assert_close(got, module.linear2(hidden))
        assert not torch.allclose(module(x), got)  # the next mask is another
        whole = bias_act(module.linear1(x), activation=activation)
        torch.testing.assert_close(module.eval()(x), module.linear2(whole))


def test_a_kernel_is_used_where_there_is_one_and_the_reference_where_it_is_asked_for():
    x = torch.randn(3, 4)
    expected = any(op.why_not(b, x, None, None, "relu", 0.5) is None for b in op.order[:-1])
    assert has_kernel(x, "relu", 0.5) == has_kernel(x, "gelu_tanh") == expected
    assert not has_kernel(x, "relu") and not has_kernel(x, "gelu")  # torch's own are as quick on a CPU
    large = torch.zeros(LARGE_BYTES // 4)
    assert has_kernel(large, "relu") == has_kernel(large, "gelu") == expected
    assert not has_kernel(large[1:], "relu")
    for backend in BACKENDS:
        with use_backend(backend):
            assert has_kernel(x, "relu") == (op.why_not(backend, x, None, None, "relu", 0.0) is None)
            assert has_kernel(x.double(), "relu") == (backend == "reference")


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_large_activations_and_their_gradients_are_those_of_torch(activation, monkeypatch):
    torch.manual_seed(1)
    module, rows = FeedForward(8, 2048, activation=activation), LARGE_BYTES // 4 // 2048
    x = torch.randn(rows, 8, requires_grad=True)

    def results():
        y = module(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    got = results()
    monkeypatch.setattr("fused_transformer.feed_forward.has_kernel", lambda *_: False)
    for one, wanted in zip(got, results(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_torch_compile_is_left_to_fuse_by_itself():
    module, tensors = make()
    with use_backend("reference"):
        graphs = []

        def backend(graph, _inputs):
            graphs.append(graph)
            return graph

        got = torch.compile(module, backend=backend, fullgraph=True)(tensors["x"])
    assert len(graphs) == 1
    torch.testing.assert_close(got, module(tensors["x"]))
