"""Attention of the newest queries over a cache of keys and values: what a decoding step does. For inference alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _cuda
from fused_transformer.kernels._autocast import SIXTEEN_BITS, in_dtype_of
from fused_transformer.kernels._checks import require_no_gradient
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.decode_attention import compiled
from fused_transformer.kernels.decode_attention.checks import checked


def _first(q: Tensor, *_rest) -> str | None:
    """On Hopper, in large batches and 16 bits, Triton's kernels need 0.2 to 0.7 of the CUDA ones' time on the device
    and 0.55 to 0.95 of it between events, though their calls cost the host twice as much; in float32 they need more."""
    sixteen_bits = q.is_cuda and q.dtype in SIXTEEN_BITS
    return "triton" if sixteen_bits and _cuda.capability(q.device)[0] == 9 else None


op = Op(__name__, order=("cuda", "triton", "cpu", "reference"), first=_first)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of a few queries, the newest of each sequence, over keys and values that lie in a cache.

        out[b, h, i] = Σ_j softmax_j(scale · q[b, h, i] · k_j) v_j

        over the keys  j < lengths[b] - (L - 1 - i)        causal: the last query sees the last key, the one before it
                                                           one less, as `causal="bottom_right"` of `attention`
                       j < lengths[b]                      not causal: the keys of an encoder, say
        where          k_j = k_cache[row, h // (H / H_k), j], likewise v_j
        with  row =    b                                   if rows is None
                       rows[b]                             if rows is (B,): queries share a row, as beams a source's
                       rows[b, j]                          if rows is (B, C): each position in a row of its own

    The last form reorders beams without moving the cache: let position j of hypothesis b be written to row b; when b
    goes on from hypothesis p, `rows[b] = rows[p]` is all there is to do.

    Args:
        q: (B, H, L, D), the queries of the newest L positions; L is 1, or a few (a forced prefix, a draft to verify, or
            beams laid side by side over one source, not causal). float32, float16, bfloat16 or float64 (reference
            only); any strides. The fused backends take D from 1 to 256.
        k_cache, v_cache: (R, H_k, C, D), R rows with room for C positions; H a multiple of H_k (grouped-query
            attention). Any strides but along the last axis, which must be contiguous: a cache is never copied. What
            lies beyond the lengths, and in rows that nobody reads, may be anything.
        lengths: (B,) int32 or int64, 0 ... C: how many keys the sequence has, the L newest included. None: C for all.
        rows: None (then R = B), (B,) or (B, C), int32 or int64, 0 ... R - 1. What a (B, C) table holds at and beyond
            the length is never read. int32 is better: half as much to read.
        causal: False if all queries see all the keys.
        scale: default 1 / √D.

    Returns:
        q's shape, dtype and device. A query without keys gives 0. Under torch.autocast q is taken in the cache's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a length or row is out of its range, or a gradient is asked
            for; the sentence says which. On a GPU the numbers in lengths and rows are not looked at (the host would
            have to wait for the device): those out of range count as the nearest that is not.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: scores, softmax and sums in float32; error at most twice that of plain torch in the same dtype. NaN or
        Inf in a key or value that a query does not see never reaches its output. Deterministic: the same bits on every
        run; a sequence's result depends on its own queries, keys and length and on C, and on nothing else in the batch.
    Source: Vaswani et al. 2017, eq. 1; keys split over processors and merged by their softmax statistics: Dao et al.
        2023, "Flash-Decoding for long-context inference".
    """
    return _decode(q, k_cache, v_cache, lengths, rows, causal, scale, wants_lse=False)[0]


def decode_attention_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, and the logarithm of each query's softmax denominator.

        lse[b, h, i] = log Σ_j exp(scale · q[b, h, i] · k_j)        over the keys that the query sees; -inf if none

    Two results over disjoint keys merge by it: with lse = log(exp(lse1) + exp(lse2)) the attention to both is
    exp(lse1 - lse) · out1 + exp(lse2 - lse) · out2.

    Returns:
        out: as `decode_attention`.
        lse: (B, H, L) float32 (float64 for float64 inputs).
    """
    out, lse = _decode(q, k_cache, v_cache, lengths, rows, causal, scale, wants_lse=True)
    assert lse is not None
    return out, lse


def _decode(q, k_cache, v_cache, lengths, rows, causal, scale, *, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    if routed(q):
        return compiled.decode_attention(q, k_cache, v_cache, lengths, rows, causal, scale, wants_lse)
    require_no_gradient("decode_attention", ", or attention", q=q, k_cache=k_cache, v_cache=v_cache)
    if torch._C._is_any_autocast_enabled():
        q = in_dtype_of(q, k_cache)
    arguments = (*checked(q, k_cache, v_cache, lengths, rows, causal, scale), wants_lse)
    return op.pick(*arguments).forward(*arguments)
