"""What is held at most: by each op, forward and with the backward pass, by a training step, by attention as it grows.

Ours may not hold more than naive torch, but for partial sums (5 %), and attention's memory must be linear in the
length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import (
    bench_bias_act,
    bench_cross_entropy,
    bench_embedding,
    bench_layer_norm,
    bench_linear_cross_entropy,
    bench_log_softmax_top_k,
    bench_scaling,
    shapes,
)
from bench.agreement import forward_backward
from bench.baselines import keep_of_lengths, naive_attention, sentence_lengths
from bench.bench_attention import tensors
from bench.bench_model import PAD, build, sentences
from fused_transformer.batches import Batch
from fused_transformer.kernels import add_layer_norm, attention, bias_act, embedding
from fused_transformer.training import batch_loss

PASSES = pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward+backward"])
SMOOTHING = 0.1


def both(hold, name: str, grad: bool, implementations: dict[str, Callable], args: tuple, shape: object) -> None:
    """Implementations by label, of which the backward pass is measured too where `grad` asks for it."""
    wrapped = {label: forward_backward(f) if grad else f for label, f in implementations.items()}
    peaks = hold(name, "forward+backward" if grad else "forward", wrapped, args, shape)
    if "naive" in peaks:
        assert peaks["fused"] <= 1.05 * peaks["naive"], peaks


@PASSES
def bench_memory_attention(hold, device, grad):
    shape = shapes.BASE_512
    lengths = sentence_lengths(shape.batch, shape.keys, device)
    keep = keep_of_lengths(lengths, shape.keys)
    wrap = forward_backward if grad else lambda function: function
    chosen = {
        "naive": wrap(partial(naive_attention, keep=keep)),
        **bench_scaling.with_mask(device, keep, wrap),
        "fused": wrap(partial(attention, k_lengths=lengths)),
    }
    what = "forward+backward" if grad else "forward"
    peaks = hold("attention with lengths", what, chosen, tensors(shape, device, grad), shape)
    assert peaks["fused"] <= 1.25 * min(peaks.values()), peaks


@PASSES
def bench_memory_add_layer_norm(hold, device, grad):
    shape = shapes.ROWS_BASE
    chosen = {"naive": bench_layer_norm.add_then_norm, "fused": add_layer_norm}
    both(hold, "add layer norm", grad, chosen, bench_layer_norm.make(shape, device, grad), shape)


@PASSES
def bench_memory_bias_act(hold, device, grad):
    shape = bench_bias_act.BASE
    naive = partial(bench_bias_act.chain, activation=shape.activation)
    chosen = {"naive": naive, "fused": partial(bias_act, activation=shape.activation)}
    both(hold, "bias act", grad, chosen, bench_bias_act.make(shape, device, grad), shape)


@PASSES
def bench_memory_embedding(hold, device, grad):
    shape = shapes.EMBEDDING_BASE
    args, positions = bench_embedding.make(shape, device, grad)
    naive = partial(bench_embedding.chain, positions=positions.to(shape.dtype))
    both(hold, "embedding", grad, {"naive": naive, "fused": embedding}, args, shape)


@PASSES
def bench_memory_cross_entropy(hold, device, grad):
    shape = bench_cross_entropy.BASE
    chosen = bench_cross_entropy.implementations(shape)
    both(hold, "cross entropy", grad, chosen, bench_cross_entropy.make(shape, device, grad), shape)


def bench_memory_linear_cross_entropy(hold, device):
    shape = bench_linear_cross_entropy.BASE
    names = {"naive": "torchs", "cross_entropy": "ours_unchunked", "fused": "fused"}
    chosen = {label: getattr(bench_linear_cross_entropy, name) for label, name in names.items()}
    both(hold, "linear cross entropy", True, chosen, bench_linear_cross_entropy.make(shape, device), shape)


def bench_memory_log_softmax_top_k(hold, device):
    shape = bench_log_softmax_top_k.SHAPES[0]
    chosen = bench_log_softmax_top_k.implementations(shape)
    both(hold, "log softmax top k", False, chosen, bench_log_softmax_top_k.make(shape, device), shape)


def bench_memory_training_step(hold, device):
    """Forward, loss, backward, Adam; its state and the gradients of the step before are there already. "fused in
    chunks" takes projection and loss together, as `train` does, where "fused" holds the logits as torch.nn does.
    """
    shape = shapes.MODEL_SMALL
    (source, source_lengths), (target, target_lengths) = sentences(shape, device), sentences(shape, device)
    expected = F.pad(target[:, 1:], (0, 1), value=PAD)
    batch = Batch(source, source_lengths, F.pad(target, (0, 1), value=PAD), target_lengths)

    def of_logits(model: nn.Module) -> Tensor:
        logits = model(source, target)
        return F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=PAD, label_smoothing=SMOOTHING)

    def in_chunks(model: nn.Module) -> Tensor:
        return batch_loss(model, batch, SMOOTHING)

    def step(label: str, loss_of: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        model = build(shape, device)[label]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)

        def run() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        return run

    chosen = {
        "torch.nn": step("torch.nn", of_logits),
        "fused": step("fused", of_logits),
        "fused in chunks": step("fused", in_chunks),
    }
    peaks = hold("training step", "forward+backward", chosen, (), shape)
    assert peaks["fused in chunks"] <= peaks["fused"], peaks


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward+backward"])
def bench_memory_attention_length(grow, device, grad):
    work = partial(bench_scaling.causal, device=device, grad=grad)
    name = "attention causal" + (" forward backward" if grad else "")
    lengths = bench_scaling.LENGTHS[4 : 7 if grad else None]
    made = grow(name, "length", lengths, work, fixed="B1 H8 D64", of="bytes")
    assert made["slopes"]["fused"] <= 1.05, made
