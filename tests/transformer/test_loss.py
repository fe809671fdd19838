"""The smoothed loss against its definition, summed over the vocabulary in float64."""

from __future__ import annotations

import pytest
import torch

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.kernels import BACKENDS, use_backend
from fused_transformer.loss import projected_cross_entropy, smoothed_cross_entropy
from tests.oracle import assert_matches, in_float64, run_with_gradients

V = 11


def by_definition(logits, targets, epsilon, convention, padding_idx):
    log_probs = torch.log_softmax(logits.double(), -1)
    losses = []
    for row, target in zip(log_probs.reshape(-1, V), targets.reshape(-1).tolist(), strict=True):
        if target == padding_idx:
            continue
        if convention == "torch":
            q = torch.full((V,), epsilon / V, dtype=torch.float64)
            q[target] += 1 - epsilon
        else:
            q = torch.full((V,), epsilon / (V - 1), dtype=torch.float64)
            q[target] = 1 - epsilon
        assert q.sum().item() == pytest.approx(1)
        losses.append(-(q * row).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("padding_idx", [0, 5])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("convention", ["torch", "tensor2tensor"])
def test_loss_and_gradient_follow_the_definition(convention, epsilon, padding_idx):
    logits = torch.randn(3, 6, V, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (3, 6))
    targets[1, 3:] = padding_idx
    loss = smoothed_cross_entropy(
        logits, targets, label_smoothing=epsilon, convention=convention, padding_idx=padding_idx
    )
    expected = by_definition(logits, targets, epsilon, convention, padding_idx)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert not gradient[targets == padding_idx].any()


@pytest.mark.parametrize("convention", ["torch", "tensor2tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_the_same_on_every_backend(backend, dtype, convention):
    """Also on those that have no kernel for it here, where torch's own function stands in."""
    tensors = {"logits": torch.randn(5, 7, 300).to(dtype), "targets": torch.randint(0, 300, (5, 7))}
    tensors["targets"][:, 5:] = 0
    naive = run_with_gradients(smoothed_cross_entropy, tensors, convention=convention)
    exact = run_with_gradients(smoothed_cross_entropy, in_float64(tensors), rounded_to=dtype, convention=convention)
    with use_backend(backend):
        got = run_with_gradients(smoothed_cross_entropy, tensors, convention=convention)
    assert got["out"].dtype == torch.float32
    assert_matches(got, exact, naive)


@pytest.mark.parametrize("tie", ["shared", "separate"])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_loss_of_hidden_states_is_that_of_their_logits(backend, tie):
    model, hidden, targets = projecting(tie)
    with use_backend(backend):
        got = gradients(projected_cross_entropy(model, hidden, targets), model, hidden)
    expected = gradients(smoothed_cross_entropy(model.project(hidden), targets), model, hidden)
    torch.testing.assert_close(got, expected)


def test_a_projection_that_is_hooked_is_called():
    model, hidden, targets = projecting("separate")
    seen = []
    model.output_projection.register_forward_hook(lambda module, given, logits: seen.append(logits.shape))
    projected_cross_entropy(model, hidden, targets)
    assert seen == [(3, 5, 30)]


def test_hidden_states_of_padding_alone_cost_nothing():
    model, hidden, targets = projecting("shared")
    loss = projected_cross_entropy(model, hidden, torch.zeros_like(targets))
    assert loss == 0 and not any(x.any() for x in gradients(loss, model, hidden)[1:])


def projecting(tie):
    config = TransformerConfig(source_vocab_size=30, d_model=16, num_heads=2, d_feedforward=8, tie_embeddings=tie)
    targets = torch.randint(1, 30, (3, 5))
    targets[1, 2:] = 0
    return Transformer(config), torch.randn(3, 5, 16, requires_grad=True), targets


def gradients(loss, model, hidden):
    weight, bias = model.output_weights()
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_the_conventions_differ():
    logits, targets = torch.randn(4, V), torch.tensor([1, 2, 3, 4])
    losses = {smoothed_cross_entropy(logits, targets, convention=c).item() for c in ("torch", "tensor2tensor")}
    assert len(losses) == 2


def test_padding_alone_costs_nothing():
    logits = torch.randn(2, 3, V, requires_grad=True)
    loss = smoothed_cross_entropy(logits, torch.zeros(2, 3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"logits must be \(\.\.\., V\) and targets \(\.\.\.\)"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        ({"convention": "fairseq"}, "convention must be one of 'torch', 'tensor2tensor', got 'fairseq'"),
        ({"label_smoothing": 0.95, "convention": "tensor2tensor"}, "less than its share of 11 tokens"),
    ],
)
def test_refused_arguments(options, message):
    arguments = {"logits": torch.randn(3, V), "targets": torch.ones(3, dtype=torch.int64), **options}
    with pytest.raises(ValueError, match=message):
        smoothed_cross_entropy(**arguments)
