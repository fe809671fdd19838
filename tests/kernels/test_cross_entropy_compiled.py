"""Cross entropy as an operator: under torch.compile and torch.func and for meta tensors it is what it is in eager."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import cross_entropy, use_backend
from fused_transformer.kernels.cross_entropy import op
from tests.inputs import dtype_id, normal, running_on
from tests.oracle import assert_equal, run_with_gradients

BACKENDS = op.order
OPTIONS = {"label_smoothing": 0.1, "smoothing": "others", "z_loss": 0.01, "ignore_index": 2}
AS_SCHEMA = (0.1, "others", 0.01, 2)


def make(dtype=torch.float32, device="cpu"):
    targets = torch.randint(0, 70, (4, 5))
    targets[1, 2:] = 2
    return {"logits": normal(4, 5, 70, dtype=dtype, device=device), "targets": targets.to(device)}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_one_node_with_eagers_numbers(backend, reduction, device):
    tensors = make(device=device)

    def function(logits, targets):
        return cross_entropy(logits * 2, targets, reduction=reduction, **OPTIONS) + 1

    with running_on(backend):
        eager = run_with_gradients(function, tensors)
        compiled = run_with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), tensors)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_the_operator_keeps_torchs_rules(dtype):
    tensors = make(dtype)
    for logits in (tensors["logits"], tensors["logits"].transpose(0, 1).contiguous().transpose(0, 1)):
        arguments = (logits.detach().requires_grad_(), tensors["targets"], *AS_SCHEMA)
        torch.library.opcheck(torch.ops.fused_transformer.cross_entropy.default, arguments)
    with use_backend("reference"):
        losses, *statistics = torch.ops.fused_transformer.cross_entropy(
            tensors["logits"], tensors["targets"], *AS_SCHEMA
        )
    arguments = (torch.ones_like(losses), tensors["logits"], tensors["targets"], *statistics, *AS_SCHEMA)
    torch.library.opcheck(torch.ops.fused_transformer.cross_entropy_backward.default, arguments)


def test_the_gradient_may_run_on_another_backend_than_the_loss():
    """The statistics of a row are there whichever backend made them."""
    tensors = make()
    expected = run_with_gradients(cross_entropy, tensors, **OPTIONS)
    for first, second in (("reference", "triton"), ("triton", "reference")):
        logits = tensors["logits"].clone().requires_grad_()
        with running_on(first):
            loss = torch.ops.fused_transformer.cross_entropy(logits, tensors["targets"], *AS_SCHEMA)[0]
        upstream = torch.where(tensors["targets"] == 2, 0.0, 1.0) / (tensors["targets"] != 2).sum()
        with running_on(second):
            (gradient,) = torch.autograd.grad(loss, logits, upstream)
        scale = torch.randn((), generator=torch.Generator().manual_seed(20170612), dtype=torch.float64).float()
        torch.testing.assert_close(gradient * scale, expected["dlogits"])


def test_torch_func_gives_what_autograd_gives():
    tensors = make()
    logits, targets = tensors.values()
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(leaf, targets, **OPTIONS), leaf)
    got = torch.func.grad(lambda x: cross_entropy(x, targets, **OPTIONS))(logits)
    torch.testing.assert_close(got, expected)
    losses = torch.func.vmap(lambda x, t: cross_entropy(x, t, reduction="none", **OPTIONS))(logits, targets)
    torch.testing.assert_close(losses, cross_entropy(logits, targets, reduction="none", **OPTIONS))
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: cross_entropy(y, targets))(x).square().sum())(logits)


def test_meta_tensors_have_the_shapes():
    for dtype in (torch.bfloat16, torch.float64):
        logits = torch.empty(4, 5, 70, dtype=dtype, device="meta", requires_grad=True)
        targets = torch.empty(4, 5, dtype=torch.int64, device="meta")
        loss = cross_entropy(logits, targets)
        assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
        assert cross_entropy(logits, targets, reduction="none").shape == (4, 5)
        loss.backward()
        assert logits.grad.shape == logits.shape and logits.grad.dtype == dtype


def test_a_compiled_call_says_what_is_wrong_when_it_runs():
    tensors = make()
    compiled = torch.compile(lambda x, t: cross_entropy(x, t), backend="aot_eager")
    assert_equal(compiled(*tensors.values()), cross_entropy(**tensors))
    tensors["targets"][3, 4] = 70
    with pytest.raises(IndexError, match=r"targets holds 70 at index \[3, 4\]"):
        compiled(*tensors.values())
