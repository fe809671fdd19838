"""Decode attention as an operator of torch; see kernels/_compile.py."""

from __future__ import annotations

import torch

from fused_transformer.kernels._autocast import in_dtype_of
from fused_transformer.kernels._checks import require_no_gradient
from fused_transformer.kernels._compile import absent, laid_out_like, operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.decode_attention.checks import checked


def decode_attention(q, k_cache, v_cache, lengths, rows, causal, scale, wants_lse):
    """`_decode` as one node."""
    require_no_gradient("decode_attention", ", or attention", q=q, k_cache=k_cache, v_cache=v_cache)
    q = in_dtype_of(q, k_cache)
    out, lse = _decode_attention(q, k_cache, v_cache, lengths, rows, causal, scale, wants_lse)
    return out, lse if wants_lse else None


def _forward(*arguments):
    *arguments, wants_lse = arguments
    q, *rest = checked(*arguments)
    out, lse = OPS["decode_attention"].pick(q, *rest, wants_lse).forward(q, *rest, wants_lse)
    return laid_out_like(q, out), lse.contiguous() if wants_lse else absent(q)


def _forward_fake(*arguments):
    *arguments, wants_lse = arguments
    q, *_ = checked(*arguments)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics) if wants_lse else absent(q)


def _flops(q, k_cache, *_, **__):
    batch, heads, length, width = q
    return 4 * batch * heads * length * k_cache[2] * width  # of the cache's whole capacity: lengths are not looked at


_decode_attention = operator(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? rows, bool causal, "
    "float? scale, bool wants_lse) -> (Tensor out, Tensor lse)",
    run=_forward,
    fake=_forward_fake,
    flops=_flops,
)
