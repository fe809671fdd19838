"""What one would use instead: naive torch, F.scaled_dot_product_attention with its backend forced, torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import guarded
from bench.timing import Within

# WMT 2014 English-German: 116 million English words in 4.5 million pairs, 26 to a sentence, or about 30 subwords. The
# logarithm of a sentence's length is close to normal: this mean of it, and this deviation, give 30 on average.
WMT_LOG_MEAN, WMT_LOG_DEVIATION = math.log(30) - 0.6**2 / 2, 0.6


def sentence_lengths(batch: int, longest: int, device: str = "cpu", mix: str = "even") -> Tensor:
    """(B,) int64 from 1 to `longest`: a batch of sentences, padded, in random order.

    "even": from a fifth of the longest to the longest in equal steps, 60 % on average. "wmt": as sentences of WMT are,
    unsorted: the quantiles of that distribution, the last one taken as the longest.
    """
    if mix == "wmt":
        places = (torch.arange(batch) + 0.5) / batch
        lengths = torch.exp(WMT_LOG_MEAN + WMT_LOG_DEVIATION * torch.special.ndtri(places.double()))
        lengths[-1] = longest
    else:
        lengths = torch.linspace(0.2, 1.0, max(batch, 1)) * longest
    return lengths.round().long().clamp(1, longest)[torch.randperm(batch)].to(device)


def keep_of_lengths(lengths: Tensor, longest: int) -> Tensor:
    """(B, 1, 1, S) bool, True = attend: what SDPA users build of the lengths, once a batch."""
    return (torch.arange(longest, device=lengths.device) < lengths[:, None])[:, None, None]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, keep=None, bias=None) -> Tensor:
    """The paper's equation as most write it."""
    k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return torch.softmax(scores, -1) @ v


def sdpa(backend: SDPBackend, wrap: Callable = lambda function: function, **options) -> Within:
    """F.scaled_dot_product_attention on one named backend; `wrap` may be forward_backward."""
    function = partial(F.scaled_dot_product_attention, **options)
    return Within(partial(sdpa_kernel, backend), wrap(function))


def flex(wrap: Callable = lambda function: function, *, mask: tuple | None = None, score_mod=None) -> Callable:
    """FlexAttention, compiled at the first call. `mask` is create_block_mask's first five arguments: the mask is built
    ahead of the clock, as SDPA's is.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    made: dict = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            torch.compiler.reset()  # of one function eight compilations are kept: beyond them it would run uncompiled
            made["run"] = torch.compile(flex_attention, dynamic=False)
            made["blocks"] = create_block_mask(*mask, device=q.device) if mask else None
        options = {"score_mod": score_mod, "enable_gqa": q.shape[1] != k.shape[1]}
        return made["run"](q, k, v, block_mask=made["blocks"], **options)

    return guarded(wrap(attend))


def mixed(device: str, dtype: torch.dtype = torch.float32) -> AbstractContextManager:
    """What layers and models of `dtype` run in: on a GPU autocast to bfloat16, as trainings there do; float64 never."""
    if device == "cpu" or dtype == torch.float64:
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def sdpa_backends(device: str) -> dict[str, SDPBackend]:
    """The backends SDPA has on a device, under the names of the result tables."""
    flash_and_math = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa math": SDPBackend.MATH}
    if device == "cpu":
        return flash_and_math
    return flash_and_math | {
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    }


def compiled(function: Callable) -> Callable:
    """torch.compile for these shapes; compiling (tens of seconds on 2 cores) happens before anything is timed."""
    return torch.compile(function, dynamic=False)
