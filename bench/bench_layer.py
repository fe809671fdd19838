"""Encoder and decoder layers against torch.nn's with the same weights, on batches of sentences of different lengths.

Sentences fill 60 % of the batch on average. What stands in padding is nobody's result: outputs are compared at the
real tokens, and the upstream gradient is 0 elsewhere. Forward alone is inference: eval mode without autograd, where
torch.nn takes its own fused path. Forward and backward is training: with dropout, compared ahead of it without. On a
GPU all run under autocast to bfloat16. Operations are those of the real tokens and the pairs among them; with the
backward pass three times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from bench import shapes
from bench.agreement import assert_close_in_norm
from bench.baselines import mixed, sentence_lengths
from fused_transformer import Decoder, DecoderLayer, Encoder, EncoderLayer
from tests.oracle import assert_matches

LAYERS = [shapes.LAYER_BASE_64, shapes.LAYER_BASE_128, shapes.LAYER_WMT]
DEPTH = 2
DROPOUT = 0.1


class Batch:
    """Padded inputs on the device: x and memory (B, L, E), their lengths, and torch.nn's masks of the same."""

    def __init__(self, shape: shapes.Layer, device: str):
        self.shape = shape
        self.lengths = sentence_lengths(shape.batch, shape.length, device, shape.mix)
        self.x = torch.randn(shape.batch, shape.length, shape.width, device=device)
        self.memory = torch.randn_like(self.x)
        self.padding = torch.arange(shape.length, device=device) >= self.lengths[:, None]
        self.future = torch.ones(shape.length, shape.length, dtype=torch.bool, device=device).triu(1)
        self.upstream = torch.randn_like(self.x).masked_fill(self.padding[..., None], 0.0)

    def flops(self, *, decoder: bool = False, training: bool = False, layers: int = 1) -> int:
        e, f = self.shape.width, self.shape.feedforward
        tokens, pairs = int(self.lengths.sum()), int(self.lengths.square().sum())
        linear = 2 * tokens * (4 * e * e * (1 + decoder) + 2 * e * f)
        seen = pairs + (pairs + tokens) // 2 if decoder else pairs  # all of memory, and half of itself
        return layers * (linear + 4 * e * seen) * (3 if training else 1)


Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of x and memory


def race(compare, batch: Batch, modules: dict[str, nn.Module], forwards: dict[str, Forward], training, flops) -> None:
    """One row: `modules` and `forwards` by the names of the implementations, "torch.nn" and "fused"."""

    def run(label: str, module: nn.Module) -> list[Tensor]:
        parameters = list(module.parameters())
        x, memory, upstream = (y.to(parameters[0].dtype) for y in (batch.x, batch.memory, batch.upstream))
        dtype = parameters[0].dtype
        if not training:
            with torch.no_grad(), mixed(x.device.type, dtype):
                return [forwards[label](module, x, memory)]
        with mixed(x.device.type, dtype):
            out = forwards[label](module, x.requires_grad_(), memory.requires_grad_())
        upstream = upstream.to(out.dtype)
        return [out, *torch.autograd.grad(out, [x, *parameters], upstream)]

    def check(_results) -> None:
        """Without dropout: with it, no two runs are equal."""
        for module in modules.values():
            module.eval()
        torchs = modules["torch.nn"]
        exact, *exact_gradients = run("torch.nn", deepcopy(torchs).double())
        naive, *naive_gradients = run("torch.nn", torchs)
        got, *gradients = run("fused", modules["fused"])
        real = ~batch.padding
        got, naive = got.float(), naive.float()
        assert_matches(*(out[real].detach() for out in (got, exact, naive)), factor=4.0, ulps=16.0)
        names = ["x", *(name for name, _ in torchs.named_parameters())][: len(gradients)]
        ours, exactly, naively = (
            dict(zip(names, some, strict=True)) for some in (gradients, exact_gradients, naive_gradients)
        )
        assert_close_in_norm(ours, exactly, naive=naively if got.is_cuda else None)
        for module in modules.values():
            module.train(training)

    for module in modules.values():
        module.train(training)
    implementations = {label: lambda label=label: run(label, modules[label]) for label in modules}
    dtype = "float32" if batch.x.device.type == "cpu" else "bfloat16"  # of the products, under autocast
    compare(implementations, check=check, flops=flops, dtype=dtype)


def sizes(shape: shapes.Layer) -> tuple[int, int, int, float]:
    return shape.width, shape.heads, shape.feedforward, DROPOUT


def same_weights(ours: nn.Module, theirs: nn.Module, device: str) -> dict[str, nn.Module]:
    ours.load_state_dict(theirs.state_dict())
    return {"torch.nn": theirs.to(device), "fused": ours.to(device)}


EVERY_DROPOUT = {"attention_dropout": DROPOUT, "activation_dropout": DROPOUT}  # torch.nn has it in three places


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def bench_encoder_layer(compare, shape, training, device):
    batch = Batch(shape, device)
    theirs = nn.TransformerEncoderLayer(*sizes(shape), batch_first=True)
    modules = same_weights(EncoderLayer(*sizes(shape), **EVERY_DROPOUT), theirs, device)
    forwards = {
        "torch.nn": lambda layer, x, _memory: layer(x, src_key_padding_mask=batch.padding),
        "fused": lambda layer, x, _memory: layer(x, batch.lengths),
    }
    race(compare, batch, modules, forwards, training, batch.flops(training=training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", LAYERS[:1], ids=str)
def bench_decoder_layer(compare, shape, training, device):
    batch = Batch(shape, device)
    theirs = nn.TransformerDecoderLayer(*sizes(shape), batch_first=True)
    modules = same_weights(DecoderLayer(*sizes(shape), **EVERY_DROPOUT), theirs, device)

    def torchs(layer: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        masks = {"tgt_mask": batch.future, "tgt_is_causal": True, "memory_key_padding_mask": batch.padding}
        return layer(x, memory, **masks)

    forwards = {
        "torch.nn": torchs,
        "fused": lambda layer, x, memory: layer(x, memory, batch.lengths, batch.lengths),
    }
    race(compare, batch, modules, forwards, training, batch.flops(decoder=True, training=training))


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", LAYERS[:1], ids=str)
def bench_encoder_stack(compare, shape, training, device):
    """Several layers, which work on the real tokens alone (in eval mode torch.nn's do too, as nested tensors)."""
    batch = Batch(shape, device)
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(*sizes(shape), batch_first=True), DEPTH)
    ours = Encoder(DEPTH, **_options(shape))
    forwards = {
        "torch.nn": lambda stack, x, _memory: stack(x, src_key_padding_mask=batch.padding),
        "fused": lambda stack, x, _memory: stack(x, batch.lengths),
    }
    race(
        compare,
        batch,
        same_weights(ours, theirs, device),
        forwards,
        training,
        batch.flops(training=training, layers=DEPTH),
    )


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", LAYERS[:1], ids=str)
def bench_decoder_stack(compare, shape, training, device):
    batch = Batch(shape, device)
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(*sizes(shape), batch_first=True), DEPTH)
    ours = Decoder(DEPTH, **_options(shape))

    def torchs(stack: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        masks = {"tgt_mask": batch.future, "tgt_is_causal": True, "memory_key_padding_mask": batch.padding}
        return stack(x, memory, **masks)

    forwards = {
        "torch.nn": torchs,
        "fused": lambda stack, x, memory: stack(x, memory, batch.lengths, batch.lengths),
    }
    flops = batch.flops(decoder=True, training=training, layers=DEPTH)
    race(compare, batch, same_weights(ours, theirs, device), forwards, training, flops)


def _options(shape: shapes.Layer) -> dict:
    names = ("d_model", "num_heads", "d_feedforward", "dropout")
    return dict(zip(names, sizes(shape), strict=True)) | EVERY_DROPOUT
