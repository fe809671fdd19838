"""What the engines of `bench.ctranslate2` are given to translate, and the least time that it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.engines import Engine, Tokens
from bench.timing import seconds
from fused_transformer import TransformerConfig
from fused_transformer.kernels import matmul

SPECIAL = 4  # padding, bos, eos, unknown
SHORTEST, LONGEST = 8, 60
SENTENCES_AT_LEAST = 4  # that a round translates, so that batch 1 is not one length alone
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """What a row times: the sources, in batches of `batch`, by `beam_size` beams on `threads` threads."""

    batch: int
    beam_size: int
    threads: int
    length: int
    batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def tokens(self) -> int:
        """Generated in a round."""
        return self.length * sum(map(len, self.batches))

    @property
    def name(self) -> str:
        how = "greedy" if self.beam_size == 1 else f"beam {self.beam_size}"
        return f"batch {self.batch} {how}, {self.threads} thread{'s' * (self.threads > 1)}"

    def run(self, engine: Engine) -> list[Tokens]:
        found: list[Tokens] = []
        for sources in self.batches:
            found += engine.translate([list(source) for source in sources], self.beam_size, self.length)
        return found


def make_work(batch: int, beam_size: int, threads: int, length: int, vocabulary: int) -> Work:
    """The same sources whichever the engine, the beam and the threads."""
    draw = torch.Generator().manual_seed(batch)
    count = max(1, SENTENCES_AT_LEAST // batch)
    batches = []
    for _ in range(count):
        lengths = torch.randint(SHORTEST, LONGEST + 1, (batch,), generator=draw).tolist()
        batches.append(tuple(tuple(torch.randint(SPECIAL, vocabulary, (n,), generator=draw).tolist()) for n in lengths))
    return Work(batch, beam_size, threads, length, tuple(batches))


def rates(threads: int) -> dict[str, float]:
    """Bytes read and float32 operations a second on so many threads; products are the quicker of torch's and ours."""
    torch.set_num_threads(threads)
    memory, square = torch.ones(2**26), torch.randn(1024, 1024)
    read = min(seconds(torch.sum, (memory,)) for _ in range(7))
    products = [torch.mm, matmul.product] if torch.float32 in matmul.QUICKER else [torch.mm]
    product = min(seconds(product, (square, square)) for product in products for _ in range(7))
    return {"read_bytes": 4 * memory.numel() / read, "operations": 2 * 1024**3 / product}


def least_seconds(config: TransformerConfig, work: Work, weights: str, rate: dict[str, float]) -> float:
    """What a round takes at least: each product bound by its operations or, once a batch, by reading its weights.

    Operations are counted at float32's rate, which bfloat16 and int8 may exceed: their share can come out above 1.
    Attention, norms and the search are not counted.
    """
    e, f = config.d_model, config.d_feedforward
    encoder = config.num_encoder_layers * (4 * e * e + 2 * e * f)
    memory = config.num_decoder_layers * 2 * e * e  # keys and values of the encoder's output
    step = config.num_decoder_layers * (6 * e * e + 2 * e * f) + config.target_vocab_size * e

    def bound(parameters: int, rows: int) -> float:
        return max(BYTES[weights] * parameters / rate["read_bytes"], 2 * parameters * rows / rate["operations"])

    total = 0.0
    for sources in work.batches:
        rows = sum(len(source) + 1 for source in sources)
        total += bound(encoder, rows) + bound(memory, rows)
        total += bound(step, len(sources)) + (work.length - 1) * bound(step, len(sources) * work.beam_size)
    return total
