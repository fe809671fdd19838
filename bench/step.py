"""Where the time of a decoding step goes: products, attention, norms, vocabulary and search.

    python -m bench.step [--threads 1 2] [--weights float32 bfloat16 int8] [--output FILE]

The model is Transformer-base with 32,000 subwords and random weights, packed as `translate` packs it, and POSITION
tokens into translations of sources of SOURCE tokens. The layers' part of a step is one native call, which tells how
long its products, attention and norms took; "rest" is the embedding and what surrounds the call. "limit" is the least
time for reading all weights or multiplying by them, at rates measured in the same run; a greedy step without scores
does without most of the vocabulary's.
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
from fused_transformer.kernels import log_softmax_top_k
from fused_transformer.kernels.decoder_step.native import timing

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
        self.inside: list[Tensor] = []  # of each call: seconds of products, attention and norms
        self.hidden = self.layers()
        self.logits = model.project(self.hidden)
        self.scores = torch.zeros(self.rows)
        self.screened = beams == 1 and self.likeliest() is not None

    def layers(self) -> Tensor:
        """The native call, and the embedding ahead of it."""
        with timing() as seconds:
            hidden = self.model.step(self.tokens, self.state)
        self.inside.append(seconds)
        self.state.length -= 1  # so that each call is of the same position
        return hidden

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
        return {name: getattr(self, name) for name in ("layers", "vocabulary", "search")}


def limit(config: TransformerConfig, rows: int, weights: str, rate: dict[str, float]) -> float:
    """Microseconds that a step's products take at least."""
    e, f = config.d_model, config.d_feedforward
    parameters = config.num_decoder_layers * (6 * e * e + 2 * e * f) + config.target_vocab_size * e
    return 1e6 * max(BYTES[weights] * parameters / rate["read_bytes"], 2 * parameters * rows / rate["operations"])


def measure(model: PackedTransformer, batch: int, beams: int, threads: int, rate: dict[str, float]) -> dict:
    """One row: medians in microseconds."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        step = Step(model, batch, beams)
        timer = Interleaved(step.parts(), ())
        for _ in range(ROUNDS + 2):
            timer.round()
    times = {name: quantiles(measured[2:])["median_us"] for name, measured in timer.times.items()}
    inside = 1e6 * torch.stack(step.inside[-ROUNDS:]).median(0).values
    times |= dict(zip(("products", "attention", "norms"), inside.tolist(), strict=True))
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
