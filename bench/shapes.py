"""The shapes of the benchmarks, each named after the model it comes from.

Batches hold about 4,096 tokens, the size a 2-core machine works through in milliseconds. On a GPU (what --device says)
they hold 16 times as many, and what is float32 on a CPU is bfloat16 and the other way round: a few rows of a group are
for the rarer dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from bench.timing import Stamp

TIMES_ON_A_GPU = 16
COUNTS = ("batch", "rows", "tokens", "sentences")  # what is 16 times as many


def here(shape):
    """The shape as this device is given it. Stamp.device is set ahead of the first import of a benchmark."""
    if Stamp.device == "cpu":
        return shape
    counts = {one.name: TIMES_ON_A_GPU * getattr(shape, one.name) for one in fields(shape) if one.name in COUNTS}
    if not hasattr(shape, "dtype"):
        return replace(shape, **counts)
    other = torch.float32 if shape.dtype == torch.bfloat16 else torch.bfloat16
    return replace(shape, **counts, dtype=other)


def suffix(dtype: torch.dtype) -> str:
    """What a row's name says of its dtype: nothing for float32."""
    return "" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Attention:
    """H heads of width D (H_k of them for keys), L queries and S keys, in a batch of B."""

    model: str
    batch: int
    heads: int
    length: int
    keys: int
    width: int = 64
    heads_k: int | None = None
    dtype: torch.dtype = torch.float32
    mix: str = "even"  # how the lengths of a batch's sentences are spread (bench/baselines.py)

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.heads_k}" if self.heads_k else "")
        length = f"L{self.length}" + (f" S{self.keys}" if self.keys != self.length else "")
        return f"{self.model} B{self.batch} {heads} {length} D{self.width}{suffix(self.dtype)}"


@dataclass(frozen=True)
class Embedding:
    """B sequences of L tokens out of a vocabulary of V, width E."""

    model: str
    batch: int
    length: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} L{self.length} E{self.width} V{self.vocabulary}{suffix(self.dtype)}"


@dataclass(frozen=True)
class Rows:
    """A row-wise op on M tokens of width E."""

    model: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} M{self.rows} E{self.width}{suffix(self.dtype)}"


@dataclass(frozen=True)
class Layer:
    """One layer, or a stack of them, on B sentences of up to L tokens: width E, H heads, feed-forward width F."""

    model: str
    batch: int
    length: int
    width: int = 512
    heads: int = 8
    feedforward: int = 2048
    mix: str = "even"

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} L{self.length} E{self.width} H{self.heads}"


@dataclass(frozen=True)
class Model:
    """A whole encoder-decoder model on B sentence pairs of up to L tokens."""

    model: str
    batch: int
    length: int
    width: int
    heads: int
    feedforward: int
    layers: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} L{self.length} E{self.width} N{self.layers} V{self.vocabulary}"


# Vaswani et al. 2017, base: E = 512, 8 heads of 64. Sentences of one batch differ in length (bench/baselines.py).
BASE_64 = here(Attention("transformer-base", 64, 8, 64, 64))
BASE_128 = here(Attention("transformer-base", 32, 8, 128, 128))
BASE_512 = here(Attention("transformer-base", 8, 8, 512, 512))
BASE_128_BF16 = here(Attention("transformer-base", 32, 8, 128, 128, dtype=torch.bfloat16))
BASE_CROSS = here(Attention("transformer-base", 32, 8, 64, 128))
BASE_STEP = here(Attention("transformer-base", 64, 8, 1, 128))  # one decoding step over the encoder's memory
# the paper's task: most of a batch is padding
WMT = here(Attention("transformer-base wmt", 64, 8, 107, 107, mix="wmt"))
BERT = here(Attention("bert-base", 32, 12, 128, 128))
VIT = here(Attention("vit-base-16", 16, 12, 197, 197))
GPT2 = here(Attention("gpt2", 2, 12, 1024, 1024))
T5 = here(Attention("t5-base", 8, 12, 256, 256))
LLAMA_1B = here(Attention("llama-3.2-1b", 1, 32, 512, 512, heads_k=8))
LLAMA_8B = here(Attention("llama-3-8b", 1, 32, 512, 512, width=128, heads_k=8))
# Long enough to be about kernels alone. llama-3-70b: what one of eight GPUs has of it.
LONG_BF16 = (
    Attention("llama-3.2-1b", 4, 32, 2048, 2048, heads_k=8, dtype=torch.bfloat16),
    Attention("llama-3-8b", 2, 32, 2048, 2048, width=128, heads_k=8, dtype=torch.bfloat16),
    Attention("llama-3-70b", 1, 8, 8192, 8192, width=128, heads_k=1, dtype=torch.bfloat16),
)

EMBEDDING_BASE = here(Embedding("transformer-base", 32, 128, 512, 32000))
EMBEDDING_BIG = here(Embedding("transformer-big", 16, 128, 1024, 32000))
EMBEDDING_BASE_BF16 = here(Embedding("transformer-base", 32, 128, 512, 32000, dtype=torch.bfloat16))
EMBEDDING_STEP = here(Embedding("transformer-base step", 64, 1, 512, 32000))  # one decoding step

ROWS_BASE = here(Rows("transformer-base", 4096, 512))
ROWS_BASE_BF16 = here(Rows("transformer-base", 4096, 512, dtype=torch.bfloat16))
ROWS_BIG = here(Rows("transformer-big", 4096, 1024))
ROWS_STEP = here(Rows("transformer-base step", 64, 512))  # one decoding step

LAYER_BASE_64 = here(Layer("transformer-base", 32, 64))
LAYER_BASE_128 = here(Layer("transformer-base", 16, 128))
LAYER_WMT = here(Layer("transformer-base wmt", 32, 107, mix="wmt"))

# small: what a 2-core machine trains on Multi30k; base: the paper's, with a vocabulary of 8,000
MODEL_SMALL = here(Model("transformer-small", 64, 32, 256, 4, 1024, 3, 8000))
MODEL_BASE = here(Model("transformer-base", 16, 32, 512, 8, 2048, 6, 8000))
