"""Cross entropy's first link of the chain of trust: F.cross_entropy in float64, or the written sum <- the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import cross_entropy, use_backend
from tests.oracle import run_with_gradients

DOUBLE = torch.float64
V = 11


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


def make(rows=13, vocabulary=V, ignore_index=-100):
    targets = torch.randint(0, vocabulary, (rows,))
    targets[2::5] = ignore_index
    return {"logits": 3 * torch.randn(rows, vocabulary, dtype=DOUBLE), "targets": targets}


def torchs(logits, targets, **options):
    return F.cross_entropy(logits, targets, **options)


def assert_is_torchs(tensors, **options):
    got, expected = (
        run_with_gradients(cross_entropy, tensors, **options),
        run_with_gradients(torchs, tensors, **options),
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def written_out(logits, targets, *, label_smoothing=0.0, smoothing="uniform", z_loss=0.0, ignore_index=-100):
    """The docstring's formula, one row after another."""
    losses = []
    vocabulary = logits.shape[-1]
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target == ignore_index:
            losses.append(0 * row.sum())
            continue
        others = label_smoothing / (vocabulary if smoothing == "uniform" else vocabulary - 1)
        q = torch.full((vocabulary,), others, dtype=DOUBLE)
        q[target] = 0.0
        q[target] = 1.0 - q.sum()
        losses.append(-(q * row.log_softmax(-1)).sum() + z_loss * row.logsumexp(-1) ** 2)
    return torch.stack(losses)


@pytest.mark.parametrize("ignore_index", [-100, 0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_it_is_torchs(label_smoothing, reduction, ignore_index):
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "ignore_index": ignore_index}
    assert_is_torchs(make(ignore_index=ignore_index), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_are_all_ignored_or_none_at_all(reduction):
    tensors = make(5)
    assert_is_torchs({name: x[:0] for name, x in tensors.items()}, reduction=reduction)
    tensors["targets"].fill_(-100)
    assert_is_torchs(tensors, reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_words_that_can_not_be(label_smoothing):
    """-inf in some columns, at a target, and in a whole row: inf and NaN where torch has them."""
    tensors = make(6)
    logits, targets = tensors["logits"], tensors["targets"]
    targets[:] = torch.tensor([1, 2, 3, 4, -100, 5])
    logits[1, 5:], logits[2, :2], logits[3, 4], logits[5] = [-torch.inf] * 4
    assert_is_torchs(tensors, label_smoothing=label_smoothing, reduction="none")


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("smoothing", ["uniform", "others"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_the_formula(label_smoothing, smoothing, z_loss):
    options = {"label_smoothing": label_smoothing, "smoothing": smoothing, "z_loss": z_loss}
    tensors = make()
    got = run_with_gradients(cross_entropy, tensors, reduction="none", **options)
    expected = run_with_gradients(written_out, tensors, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_others_leave_the_target_what_tensor2tensor_says():
    logits = torch.zeros(1, 5, dtype=DOUBLE, requires_grad=True)
    cross_entropy(logits, torch.tensor([2]), label_smoothing=0.2, smoothing="others").backward()
    q = 0.2 - logits.grad[0]  # the gradient is p - q
    torch.testing.assert_close(q, torch.tensor([0.05, 0.05, 0.8, 0.05, 0.05], dtype=DOUBLE))


@pytest.mark.parametrize("smoothing", ["uniform", "others"])
def test_a_vocabulary_of_one_word_costs_nothing(smoothing):
    tensors = {"logits": torch.randn(3, 1, dtype=DOUBLE), "targets": torch.tensor([0, -100, 0])}
    got = run_with_gradients(cross_entropy, tensors, smoothing=smoothing, label_smoothing=0.1, reduction="none")
    assert not got["out"].any() and not got["dlogits"].any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "smoothing": "others", "z_loss": 0.1}], ids=str)
def test_gradcheck(options):
    tensors = make(5, 7)
    logits = tensors["logits"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, tensors["targets"], **options), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_16_bit_logits_is_that_of_the_same_numbers_in_float32(dtype):
    tensors = make()
    logits = tensors["logits"].to(dtype)
    loss = cross_entropy(logits, tensors["targets"], label_smoothing=0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), tensors["targets"], label_smoothing=0.1))
