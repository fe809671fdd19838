"""A whole training step beside the same model of torch.nn, eager and under torch.compile, and where its time goes.

    python -m bench.training [--threads N] [--mixes multi30k wmt] [--no-compile] [--output FILE]

A step is forward, label-smoothed cross entropy, backward and Adam on a batch of sentences in random order, padded to
the longest: Transformer-base with a shared vocabulary. Ours is `training.batch_loss`, what `train` runs: padding is
left out, and the logits are never all held. The other is nn.TransformerEncoder and nn.TransformerDecoder between
torch's embedding and F.cross_entropy (`bench_model.TorchTransformer`), on the same weights. Both must give the same
loss without dropout. Compiling takes minutes; it is done ahead of the timing.

Parts are the profiler's own times of ours, by operation. Beside each stands the least time for it, at this machine's
own rates: operations of products and of attention's unmasked pairs at that of a large product, bytes that the norms
and Adam must read and write at that of a copy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench import machine, shapes
from bench.baselines import sentence_lengths
from bench.bench_model import BOS, PAD, TorchTransformer, build
from bench.report import write_comparison
from bench.report_training import of_training
from bench.timing import Interleaved, copy_gigabytes_per_second, matmul_gigaflops_per_second, quantiles
from fused_transformer import Transformer
from fused_transformer.batches import Batch
from fused_transformer.kernels import matmul
from fused_transformer.training import batch_loss

SMOOTHING = 0.1
ROUNDS = 9


@dataclass(frozen=True)
class Mix:
    """How long sentences are: as `sentence_lengths` has it, `batch` of them."""

    batch: int
    longest: int
    mix: str


# Multi30k's captions: 14 subwords on average, the longest of 64 about 32. WMT's: 30, and 107.
MIXES = {"multi30k": Mix(64, 32, "even"), "wmt": Mix(32, 107, "wmt")}
QUICK = {"multi30k": Mix(4, 9, "even"), "wmt": Mix(4, 20, "wmt")}

OWN_PRODUCT = "matmul.product"
# Part: operations whose own time it is, by the beginning of their names in the profile.
PARTS = {
    "products": (OWN_PRODUCT, "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("_Attention",),
    "norms": ("_LayerNorm", "_AddLayerNorm"),
    "embedding": ("_Embedding",),
    "loss": ("_Total", "_CrossEntropy", "_LinearCrossEntropy"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "Optimizer"),
}


def make_batch(mix: Mix, vocabulary: int) -> Batch:
    def side(extra: int) -> tuple[Tensor, Tensor]:
        lengths = sentence_lengths(mix.batch, mix.longest, mix=mix.mix)
        tokens = torch.randint(4, vocabulary, (mix.batch, mix.longest + extra))
        return tokens.masked_fill(torch.arange(mix.longest + extra) >= lengths[:, None] + extra, PAD), lengths

    (source, source_lengths), (target, target_lengths) = side(0), side(1)
    target[:, 0] = BOS
    return Batch(source, source_lengths, target, target_lengths)


def ours_loss(model: Transformer, batch: Batch) -> Tensor:
    return batch_loss(model, batch, SMOOTHING)


def torchs_loss(model: TorchTransformer, batch: Batch) -> Tensor:
    logits = model(batch.source, batch.target[:, :-1])
    return F.cross_entropy(
        logits.flatten(0, 1), batch.target[:, 1:].flatten(), ignore_index=PAD, label_smoothing=SMOOTHING
    )


def stepper(model: nn.Module, loss_of: Callable, batch: Batch) -> Callable[[], Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def assert_same_loss(models: dict[str, nn.Module], batch: Batch) -> None:
    losses = []
    for label, loss_of in (("fused", ours_loss), ("torch.nn", torchs_loss)):
        losses.append(loss_of(models[label].eval(), batch).detach())
        models[label].train()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


def parts_of(step: Callable[[], Tensor], repeats: int = 3) -> dict[str, float]:
    """Microseconds of a step by part; "rest" is what no part has."""
    product = matmul.product

    def named(*args, **options):  # the profiler sees torch's operations alone
        with record_function(OWN_PRODUCT):
            return product(*args, **options)

    matmul.product = named  # type: ignore[assignment]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(repeats):
                step()
    finally:
        matmul.product = product
    times = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profiled.key_averages():
        name = event.key.removeprefix("autograd::engine::evaluate_function: ")
        part = next((part for part, names in PARTS.items() if name.startswith(names)), "rest")
        times[part] += event.self_cpu_time_total / repeats
    return times


def limits(shape: shapes.Model, batch: Batch, parameters: int) -> dict[str, float]:
    """Microseconds that parts of a step take at least: forward, and twice that for the backward pass."""
    e, f, layers = shape.width, shape.feedforward, shape.layers
    s, t = batch.source_lengths.double(), batch.target_lengths.double()
    sources, targets = s.sum().item(), t.sum().item()
    weights = sources * (4 * e * e + 2 * e * f) + targets * (6 * e * e + 2 * e * f) + sources * 2 * e * e
    products = 6 * (layers * weights + targets * e * shape.vocabulary)
    pairs = (s * s).sum() + (t * (t + 1) / 2).sum() + (t * s).sum()
    attention = 14 * layers * e * pairs.item()  # 2 products forward; 5 backward, the scores anew among them
    normed = 4 * e * layers * (2 * sources + 3 * targets)  # bytes of all the norms' inputs, float32
    operations, bytes_ = matmul_gigaflops_per_second(torch.float32) * 1e3, copy_gigabytes_per_second() * 1e3
    return {
        "products": products / operations,
        "attention": attention / operations,
        # x and residual in, y and the sum out; the gradient and the sum in, the gradient out.
        "norms": 7 * normed / bytes_,
        "optimizer": 7 * 4 * parameters / bytes_,
    }


def measure(name: str, mix: Mix, shape: shapes.Model, threads: int, compile: bool, rounds: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    models = build(shape, "cpu")
    batch = make_batch(mix, shape.vocabulary)
    assert_same_loss(models, batch)
    steps = {
        "fused": stepper(models["fused"], ours_loss, batch),
        "torch.nn": stepper(models["torch.nn"], torchs_loss, batch),
    }
    if compile:
        compiled = torch.compile(torchs_loss, dynamic=False)
        steps["torch.nn compiled"] = stepper(deepcopy(models["torch.nn"]), compiled, batch)
        for _ in range(2):
            steps["torch.nn compiled"]()
    timer = Interleaved(steps, ())
    for _ in range(rounds + 1):
        timer.round()
    tokens, places = int(batch.target_lengths.sum()), batch.target[:, 1:].numel()
    parameters = sum(p.numel() for p in models["fused"].parameters())
    return {
        "name": name,
        "shape": str(shape),
        "threads": threads,
        "tokens": tokens,
        "padding": round(1 - tokens / places, 3),
        "times": {label: quantiles(times[1:]) for label, times in timer.times.items()},
        "parts": {part: round(x, 1) for part, x in parts_of(steps["fused"]).items()},
        "limits": {part: round(x, 1) for part, x in limits(shape, batch, parameters).items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of the torch.nn model")
    parser.add_argument("--quick", action="store_true", help="a tiny model; no file unless --output")
    parser.add_argument("--output", type=Path, help="default: bench/results/training/<processor>_<date>.json")
    parsed = parser.parse_args(arguments)
    rows = []
    for name in parsed.mixes:
        mix, model = (QUICK if parsed.quick else MIXES)[name], ("transformer-base", 512, 8, 2048, 6, 32_000)
        if parsed.quick:
            model = ("tiny", 16, 2, 32, 1, 60)
        shape = shapes.Model(f"{model[0]} {name}", mix.batch, mix.longest, *model[1:])
        rows.append(measure(name, mix, shape, parsed.threads, not parsed.no_compile, 2 if parsed.quick else ROUNDS))
    rates = {"matmul_gflop_per_s": matmul_gigaflops_per_second(torch.float32),
             "copy_gb_per_s": copy_gigabytes_per_second()}  # fmt: skip
    result = {"machine": machine.facts(), "date": f"{date.today():%Y-%m-%d}", "rooflines": rates, "rows": rows}
    sys.stdout.write(of_training(result) + "\n")
    if parsed.output or not parsed.quick:
        write_comparison("training", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
