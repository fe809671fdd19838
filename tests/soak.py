"""Trains a tiny model for thousands of steps, and fails if the process's memory grows meanwhile.

    python -m tests.soak [--steps 10000] [--threads 2]

The text is the demo's. Every tenth of the steps a line tells step, loss and resident memory. The first fifth is not
judged: caches fill. After it the memory may grow by GROWTH at most, as the median of the last three tenths
against that of the first three.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fused_transformer import Transformer, TransformerConfig, demo
from fused_transformer.batches import Corpus
from fused_transformer.demo.corpus import make_text
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer, TrainingOptions

GROWTH = 4e6  # bytes
TENTHS = 10


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmRSS in /proc/self/status")


def make_trainer() -> Trainer:
    text = make_text(1)
    source, target = [one.source for one in text.training], [one.target for one in text.training]
    tokenizer = Tokenizer.learn([*source, *target], demo.VOCABULARY, algorithm="word", character_coverage=1.0)
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(source_vocab_size=len(tokenizer), **demo.MODEL))
    corpus = Corpus(tokenizer.encode(source), tokenizer.encode(target))
    return Trainer(model, corpus, TrainingOptions(seed=1, **demo.TRAINING))


def soak(step: Callable[[], float], steps: int, say: Callable[[str], object] = lambda line: None) -> float:
    """The growth in bytes over `steps` calls of step, which returns a loss."""
    measured, begun = [], time.monotonic()
    for tenth in range(1, TENTHS + 1):
        loss = 0.0
        for _ in range(steps // TENTHS):
            loss = step()
        gc.collect()
        measured.append(resident_bytes())
        say(f"step {tenth * (steps // TENTHS)}  {time.monotonic() - begun:.0f} s  loss {loss:.3f}  "
            f"{measured[-1] / 1e6:.1f} MB")  # fmt: skip
    settled = measured[TENTHS // 5 :]
    return statistics.median(settled[-3:]) - statistics.median(settled[:3])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    grown = soak(
        make_trainer().train_step, options.steps, lambda line: sys.stdout.write(line + "\n") and sys.stdout.flush()
    )
    sys.stdout.write(f"grown by {grown / 1e6:+.1f} MB; {GROWTH / 1e6:.0f} MB are allowed\n")
    return int(grown > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
