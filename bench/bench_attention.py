"""Masked attention against naive torch and every backend of scaled_dot_product_attention, at models' own shapes.

Operations are counted for the pairs that a query may see: 4 · D each going forward (two products), 14 · D with the
backward pass (seven). Padded and masked pairs are no work, whoever computes them. Bytes: q, k and v read and the output
written, once each, of keys those alone that a query may see (a bias is left out); with the backward pass three times as
much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench import packages, shapes
from bench.agreement import forward_backward
from bench.baselines import compiled, flex, keep_of_lengths, naive_attention, sdpa, sdpa_backends, sentence_lengths
from bench.timing import Within
from fused_transformer.kernels import attention

MASKED = (shapes.BASE_64, shapes.BASE_128, shapes.BASE_512)


def tensors(shape: shapes.Attention, device: str, grad: bool = False) -> tuple[torch.Tensor, ...]:
    def one(heads: int, length: int) -> torch.Tensor:
        return torch.randn(
            shape.batch, heads, length, shape.width, dtype=shape.dtype, device=device, requires_grad=grad
        )

    heads_k = shape.heads_k or shape.heads
    return one(shape.heads, shape.length), one(heads_k, shape.keys), one(heads_k, shape.keys)


def race(
    compare: Callable,
    shape: shapes.Attention,
    device: str,
    *,
    seen: int,
    keys: int | None = None,
    fused: dict,
    naive: dict,
    torch_s: dict,
    flexs: dict,
    packaged: str | None = None,
    grad: bool = False,
    compile: bool = False,
    also: dict[str, Callable] | None = None,
) -> None:
    """One row; `fused`, `naive`, `torch_s` and `flexs` are the mask in the words of each. `seen` and `keys`: pairs, and
    keys that any query sees (default: all), summed over batches. `also`: contexts, by label, that ours is timed in too.
    `packaged`: "causal" or "unmasked", which packages for a GPU have too.
    """
    wrap = forward_backward if grad else lambda function: function
    implementations = {"naive": wrap(partial(naive_attention, **naive)), "flex": flex(wrap, **flexs)}
    if compile:
        implementations["compile"] = wrap(compiled(partial(naive_attention, **naive)))
    if shape.heads_k:
        torch_s = {**torch_s, "enable_gqa": True}
    for label, backend in sdpa_backends(device).items():
        implementations[label] = sdpa(backend, wrap, **torch_s)
    if packaged is not None:
        implementations |= packages.attention(device, wrap, causal=packaged == "causal")
    for label, context in (also or {}).items():
        implementations[label] = Within(context, wrap(partial(attention, **fused)))
    implementations["fused"] = wrap(partial(attention, **fused))
    flops = (14 if grad else 4) * shape.heads * shape.width * seen
    keys = shape.batch * shape.keys if keys is None else keys
    rows = 2 * shape.batch * shape.length * shape.heads + 2 * keys * (shape.heads_k or shape.heads)
    bytes_moved = (3 if grad else 1) * rows * shape.width * shape.dtype.itemsize
    compare(implementations, tensors(shape, device, grad), bytes_moved=bytes_moved, flops=flops)


def with_lengths(compare, shape, device, **more) -> None:
    """Sentences of different lengths, 60 % of the longest on average: padding as a length, or as a keep mask."""
    lengths = sentence_lengths(shape.batch, shape.keys, device, shape.mix)
    keep = keep_of_lengths(lengths, shape.keys)
    seen = shape.length * int(lengths.sum())

    def real(b, _h, _i, j):
        return j < lengths[b]

    race(
        compare,
        shape,
        device,
        seen=seen,
        keys=int(lengths.sum()),
        fused={"k_lengths": lengths},
        naive={"keep": keep},
        torch_s={"attn_mask": keep},
        flexs={"mask": (real, shape.batch, None, shape.length, shape.keys)},
        **more,
    )


def causal(compare, shape, device, **more) -> None:
    seen = shape.batch * shape.length * (shape.length + 1) // 2
    keep = torch.ones(shape.length, shape.keys, dtype=torch.bool, device=device).tril()
    masks = {"fused": {"causal": "top_left"}, "naive": {"keep": keep}, "torch_s": {"is_causal": True}}
    flexs = {"mask": (lambda _b, _h, i, j: j <= i, None, None, shape.length, shape.keys)}
    race(compare, shape, device, seen=seen, **masks, flexs=flexs, packaged="causal", **more)


def unmasked(compare, shape, device, **more) -> None:
    seen = shape.batch * shape.length * shape.keys
    race(compare, shape, device, seen=seen, fused={}, naive={}, torch_s={}, flexs={}, packaged="unmasked", **more)


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize(
    "shape", [*MASKED, shapes.WMT, shapes.BASE_CROSS, shapes.BASE_STEP, shapes.BASE_128_BF16], ids=str
)
def bench_attention_with_lengths(compare, shape, device):
    with_lengths(compare, shape, device, compile=shape is shapes.BASE_128)


@pytest.mark.parametrize("shape", [shapes.BASE_512, shapes.GPT2, shapes.LLAMA_1B, shapes.LLAMA_8B], ids=str)
def bench_attention_causal(compare, shape, device):
    causal(compare, shape, device)


@pytest.mark.parametrize("shape", [shapes.BERT, shapes.VIT], ids=str)
def bench_attention_unmasked(compare, shape, device):
    unmasked(compare, shape, device)


@pytest.mark.parametrize("shape", [shapes.BERT], ids=str)
def bench_attention_keep_mask(compare, shape, device):
    """The same keep mask for all three: what a model gets that has masks already and no lengths."""
    keep = keep_of_lengths(sentence_lengths(shape.batch, shape.keys, device), shape.keys)
    keys = int(keep.sum())
    masks = {"fused": {"keep": keep}, "naive": {"keep": keep}, "torch_s": {"attn_mask": keep}}

    def kept(b, _h, _i, j):
        return keep[b, 0, 0, j]

    flexs = {"mask": (kept, shape.batch, None, shape.length, shape.keys)}
    race(compare, shape, device, seen=shape.length * keys, keys=keys, **masks, flexs=flexs)


@pytest.mark.parametrize("shape", [shapes.T5], ids=str)
def bench_attention_bias(compare, shape, device):
    """A bias for each head and pair, as T5's relative positions."""
    bias = torch.randn(1, shape.heads, shape.length, shape.keys, device=device, dtype=shape.dtype)
    seen = shape.batch * shape.length * shape.keys
    masks = {"fused": {"bias": bias}, "naive": {"bias": bias}, "torch_s": {"attn_mask": bias}}

    def biased(score, _b, h, i, j):
        return score + bias[0, h, i, j]

    race(compare, shape, device, seen=seen, **masks, flexs={"score_mod": biased})


@pytest.mark.parametrize("mask", [unmasked, causal], ids=["unmasked", "causal"])
@pytest.mark.parametrize("shape", shapes.LONG_BF16, ids=str)
def bench_attention_on_hopper(compare, shape, device, mask):
    """The CUDA backend's two forward kernels, of which "fused" is Hopper's own: what decides whether that is on unasked
    (kernels/attention/cuda_sm90.py)."""
    if device != "cuda":
        pytest.skip("both kernels are for a GPU")
    from fused_transformer.kernels.attention import cuda_sm90

    with cuda_sm90.switched(True):
        why = cuda_sm90.why_not_here(torch.device("cuda", torch.cuda.current_device()))
        if why is not None:
            pytest.skip(why)
        mask(compare, shape, device, also={"fused mma.sync": partial(cuda_sm90.switched, False)})


# ---------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("shape", [*MASKED, shapes.WMT, shapes.BASE_CROSS], ids=str)
def bench_attention_with_lengths_forward_backward(compare, shape, device):
    with_lengths(compare, shape, device, grad=True, compile=shape is shapes.BASE_128)


@pytest.mark.parametrize("shape", [shapes.BASE_512, shapes.LLAMA_1B], ids=str)
def bench_attention_causal_forward_backward(compare, shape, device):
    causal(compare, shape, device, grad=True)


@pytest.mark.parametrize("shape", [shapes.BERT], ids=str)
def bench_attention_unmasked_forward_backward(compare, shape, device):
    unmasked(compare, shape, device, grad=True)
