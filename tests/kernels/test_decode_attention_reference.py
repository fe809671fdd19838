"""The reference of decode_attention against torch's own attention in float64, one sequence and query at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.kernels import decode_attention_with_lse, use_backend
from tests.inputs import case_id
from tests.kernels.decode_attention_cases import SHAPES, build


@pytest.mark.parametrize("case", SHAPES, ids=case_id)
def test_matches_torch_one_query_at_a_time(case):
    tensors, options = build(case, torch.float64)
    with use_backend("reference"):
        out, lse = decode_attention_with_lse(**tensors, **options)
    q, k_cache, v_cache = tensors.values()
    (B, H, L, D), (_, Hk, C, _) = q.shape, k_cache.shape
    rows, lengths = options.get("rows"), options["lengths"]
    for b in range(B):
        n = C if lengths is None else int(lengths[b])
        row = (
            torch.full((n,), b) if rows is None else rows[b].long().expand(n) if rows.dim() == 1 else rows[b, :n].long()
        )
        for h in range(H):
            k, v = (cache[row, h // (H // Hk), torch.arange(n)] for cache in (k_cache, v_cache))
            for i in range(L):
                seen = max(n - (L - 1 - i), 0) if options["causal"] else n
                if seen == 0:
                    assert (out[b, h, i] == 0).all() and lse[b, h, i] == -torch.inf
                    continue
                expected = F.scaled_dot_product_attention(q[b, h, i : i + 1], k[:seen], v[:seen])[0]
                torch.testing.assert_close(out[b, h, i], expected, rtol=1e-12, atol=1e-13)
                scores = k[:seen] @ q[b, h, i] / math.sqrt(D)
                torch.testing.assert_close(lse[b, h, i], torch.logsumexp(scores, 0), rtol=1e-12, atol=1e-13)


def test_dtypes_of_the_results():
    for dtype in (torch.float64, torch.float32, torch.float16):
        tensors, options = build(SHAPES[1], dtype)
        with use_backend("reference"):
            out, lse = decode_attention_with_lse(**tensors, **options)
        assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
