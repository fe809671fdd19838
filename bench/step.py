"""Where the time of a decoding step goes: products, attention, norms, vocabulary and search.

    python -m bench.step [--threads 1 2] [--weights float32 bfloat16 int8] [--output FILE]

The model is Transformer-base with 32,000 subwords and random weights, packed as `translate` packs it, and POSITION
tokens into translations of sources of SOURCE tokens. The layers' part of a step is one native call; its own parts are
timed through the ops that it is tested against, on the same tensors, and "rest" is what the call takes beyond them
(below 0: less than the ops one by one). "limit" is the least time for reading all weights or multiplying by them, at
rates measured in the same run; a greedy step without scores does without most of the vocabulary's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from bench import machine
from bench.decoding_work import BYTES, rates
from bench.report import write_comparison
from bench.report_decoding import of_step
from bench.timing import Interleaved, quantiles
from fused_transformer import PackedTransformer, Transformer, TransformerConfig
from fused_transformer.kernels import decode_attention, layer_norm, log_softmax_top_k
from fused_transformer.kernels.linear import linear

POSITION, SOURCE = 16, 32
WORK = ((1, 1), (1, 4), (8, 1), (8, 4), (64, 1), (64, 4))  # sentences, beams
ROUNDS = 21


class Step:
    """A packed model in the middle of `batch` translations by `beams` beams, and the parts of its next step."""

    def __init__(self, model: PackedTransformer, batch: int, beams: int) -> None:
        self.model, self.batch, self.beams, self.rows = model, batch, beams, batch * beams
        source = torch.randint(4, model.config.source_vocab_size, (batch, SOURCE))
        self.state = model.start(model.encode(source), beam_size=beams)
        self.tokens = torch.randint(4, model.config.target_vocab_size, (self.rows,))
        for _ in range(POSITION):
            model.step(self.tokens, self.state)
        if beams > 1:
            self.state.reorder(torch.arange(self.rows))
        self.hidden = self.layers()
        self.logits = model.project(self.hidden)
        self.scores = torch.zeros(self.rows)
        self.screened = beams == 1 and self.likeliest() is not None

    def layers(self) -> Tensor:
        """The native call, and the embedding ahead of it."""
        hidden = self.model.step(self.tokens, self.state)
        self.state.length -= 1  # so that each call is of the same position
        return hidden

    def products(self) -> None:
        decoder, x = self.model._decoder, self.hidden
        for layer in decoder.layers:
            linear(x, layer.qkv)
            linear(x, layer.query)
            for last in (layer.self_out, layer.memory_out):
                linear(x, last, residual=x)
            linear(linear(x, layer.up, activation=decoder.activation), layer.down, residual=x)

    def attention(self) -> None:
        heads, state, filled = self.model.config.num_heads, self.state, POSITION + 1
        own = self.hidden.view(self.rows, heads, 1, -1)
        beside = self.hidden.view(self.batch, self.beams, heads, -1).transpose(1, 2)
        ancestors = None if state.ancestors is None else state.ancestors[:, :filled]
        for (keys, values), memory in zip(state.cache, state.memory, strict=True):
            decode_attention(own, keys[:, :, :filled], values[:, :, :filled], rows=ancestors)
            decode_attention(beside, *memory, state.memory_lengths, rows=state.sources, causal=False)

    def norms(self) -> None:
        decoder = self.model._decoder
        for layer in decoder.layers:
            for norm in layer.norms:
                layer_norm(self.hidden, norm.weight, norm.bias, eps=decoder.eps)

    def likeliest(self) -> tuple[Tensor, Tensor] | None:
        return self.model.likeliest(self.hidden, scores=False)

    def vocabulary(self) -> None:
        """All logits, or the likeliest token where a greedy search without scores can tell it from less."""
        if self.screened:
            self.likeliest()
        else:
            self.model.project(self.hidden)

    def search(self) -> None:
        if not self.screened:
            log_softmax_top_k(self.logits, 2 * self.beams, beams=self.beams, addend=self.scores)

    def parts(self) -> dict[str, Callable[[], object]]:
        names = ("layers", "products", "attention", "norms", "vocabulary", "search")
        return {name: getattr(self, name) for name in names}


def limit(config: TransformerConfig, rows: int, weights: str, rate: dict[str, float]) -> float:
    """Microseconds that a step's products take at least."""
    e, f = config.d_model, config.d_feedforward
    parameters = config.num_decoder_layers * (6 * e * e + 2 * e * f) + config.target_vocab_size * e
    return 1e6 * max(BYTES[weights] * parameters / rate["read_bytes"], 2 * parameters * rows / rate["operations"])


def measure(model: PackedTransformer, batch: int, beams: int, threads: int, rate: dict[str, float]) -> dict:
    """One row: medians in microseconds."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        timer = Interleaved(Step(model, batch, beams).parts(), ())
        for _ in range(ROUNDS + 2):
            timer.round()
    times = {name: quantiles(measured[2:])["median_us"] for name, measured in timer.times.items()}
    rest = times["layers"] - times["products"] - times["attention"] - times["norms"]
    whole = times["layers"] + times["vocabulary"] + times["search"]
    return {
        "batch": batch,
        "beams": beams,
        "threads": threads,
        "weights": model.weights,
        "whole": round(whole, 1),
        **{name: round(x, 1) for name, x in times.items()},
        "rest": round(rest, 1),
        "limit": round(limit(model.config, batch * beams, model.weights, rate), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", choices=BYTES, default=["float32"])
    parser.add_argument("--quick", action="store_true", help="a tiny model; no file unless --output")
    parser.add_argument("--output", type=Path, help="default: bench/results/step/<processor>_<date>.json")
    parsed = parser.parse_args(arguments)
    config = TransformerConfig(source_vocab_size=32_000)
    if parsed.quick:
        config = TransformerConfig(source_vocab_size=300, d_model=32, num_heads=2, d_feedforward=64)
    torch.manual_seed(0)
    transformer = Transformer(config).eval()
    rows = []
    for weights in parsed.weights:
        model = PackedTransformer(transformer, weights=weights)
        for threads in parsed.threads:
            rate = rates(threads)
            rows += [measure(model, batch, beams, threads, rate) for batch, beams in WORK]
    head = {"machine": machine.facts(), "date": f"{date.today():%Y-%m-%d}", "position": POSITION, "source": SOURCE}
    result = {**head, "rows": rows}
    sys.stdout.write(of_step(result) + "\n")
    if parsed.output or not parsed.quick:
        write_comparison("step", result, parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
