"""Attention of a decoding step over cached keys, against naive torch, F.scaled_dot_product_attention and `attention`.

Bytes: the keys and values that are seen, read once; all else of a step is small beside them. Operations: 4 · D for each
of them and each query that sees it.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import shapes
from bench.baselines import keep_of_lengths, naive_attention, sdpa, sdpa_backends, sentence_lengths
from fused_transformer.kernels import attention, decode_attention

# `keys` is the cache's capacity. Sequences fill 60 % of it on average.
TRANSFORMER = shapes.here(shapes.Attention("transformer-base", 64, 8, 1, 128))
GPT2 = shapes.here(shapes.Attention("gpt2", 8, 12, 1, 1024))
LLAMA_1B = shapes.here(shapes.Attention("llama-3.2-1b", 4, 32, 1, 2048, heads_k=8))
LLAMA_8B_BF16 = shapes.here(shapes.Attention("llama-3-8b", 4, 32, 1, 2048, width=128, heads_k=8, dtype=torch.bfloat16))
ALONE = shapes.Attention("llama-3.2-1b", 1, 32, 1, 4096, heads_k=8)  # one sequence: only its keys can be shared out
BEAMS = shapes.here(shapes.Attention("transformer-base beam 4", 64 * 4, 8, 1, 64))
MEMORY = shapes.here(shapes.Attention("transformer-base beam 4", 64, 8, 4, 64))  # a source's beams side by side


def tensors(shape: shapes.Attention, device: str) -> tuple[torch.Tensor, ...]:
    def one(heads: int, length: int) -> torch.Tensor:
        return torch.randn(shape.batch, heads, length, shape.width, dtype=shape.dtype, device=device)

    heads_k = shape.heads_k or shape.heads
    return one(shape.heads, shape.length), one(heads_k, shape.keys), one(heads_k, shape.keys)


def cache_bytes(shape: shapes.Attention, positions: int) -> int:
    return 2 * positions * (shape.heads_k or shape.heads) * shape.width * shape.dtype.itemsize


def operations(shape: shapes.Attention, positions: int) -> int:
    return 4 * shape.heads * shape.length * shape.width * positions


def race(compare, shape: shapes.Attention, device: str, causal: bool) -> None:
    lengths = sentence_lengths(shape.batch, shape.keys, device)
    keep = keep_of_lengths(lengths, shape.keys)
    options = {"enable_gqa": True} if shape.heads_k else {}
    implementations = {"naive": partial(naive_attention, keep=keep)}
    for label, backend in sdpa_backends(device).items():
        implementations[label] = sdpa(backend, attn_mask=keep, **options)
    implementations["attention"] = partial(attention, k_lengths=lengths)
    implementations["fused"] = partial(decode_attention, lengths=lengths, causal=causal)
    seen = int(lengths.sum())
    work = {"bytes_moved": cache_bytes(shape, seen), "flops": operations(shape, seen)}
    compare(implementations, tensors(shape, device), **work)


@pytest.mark.parametrize("shape", [TRANSFORMER, GPT2, LLAMA_1B, LLAMA_8B_BF16, ALONE], ids=str)
def bench_decode_attention(compare, shape, device):
    """One step of generation, each sequence with a length of its own."""
    race(compare, shape, device, causal=True)


@pytest.mark.parametrize("shape", [MEMORY], ids=str)
def bench_decode_attention_memory(compare, shape, device):
    """One step of beam search over the encoder's output: a source's beams are queries that all see its keys."""
    race(compare, shape, device, causal=False)


@pytest.mark.parametrize("shape", [BEAMS], ids=str)
def bench_decode_attention_beams(compare, shape, device):
    """One step of beam search over the positions so far, after the beams' choice: moved is the cache, or a table."""
    q, k, v = tensors(shape, device)
    beams = 4
    first = torch.arange(0, shape.batch, beams, device=device).repeat_interleave(beams)
    parents = first + torch.randint(0, beams, (shape.batch,), device=device)
    rows = torch.arange(shape.batch, dtype=torch.int32, device=device)[:, None].repeat(1, shape.keys)

    def moved(function):
        return lambda q, k, v: function(q, k.index_select(0, parents), v.index_select(0, parents))

    implementations = {
        "naive": moved(naive_attention),
        "sdpa": moved(F.scaled_dot_product_attention),
        "attention": moved(attention),
        "fused": lambda q, k, v: decode_attention(q, k, v, rows=rows.index_select(0, parents)),
    }
    seen = shape.batch * shape.keys
    compare(implementations, (q, k, v), bytes_moved=cache_bytes(shape, seen), flops=operations(shape, seen))
