"""Calls of decode_attention that its tests share, and how a result is judged."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import decode_attention_with_lse, use_backend
from fused_transformer.kernels.decode_attention import op
from tests.fuzz import BOUND, LOGARITHM
from tests.inputs import Case, normal, running_on
from tests.oracle import assert_matches, in_float64

BACKENDS = [name for name in op.order if name != "reference"]

# Sizes default to B 3, H 2, Hk H, L 1, C 70, D 16; R is B without rows. lengths default to 0 ... C at random.
SHAPES = (
    Case("one", B=1, H=1, C=1, D=1, lengths=(1,)),
    Case("lengths_at_the_ends", B=5, lengths=(0, 1, 70, 69, 64)),
    Case("whole_capacity", lengths=None),
    Case("one_position", C=1, lengths=(1, 0, 1)),
    Case("below_a_block", B=4, C=63, lengths=(63, 15, 16, 17)),
    Case("a_block", B=4, C=64, lengths=(64, 48, 31, 33)),
    Case("above_a_block", B=2, C=65, lengths=(65, 64)),
    Case("one_split", B=2, H=1, C=256, lengths=(256, 255)),
    Case("above_a_split", B=4, H=1, C=257, lengths=(257, 256, 1, 0)),
    Case("several_splits", B=3, H=1, C=1300, D=33, lengths=(1300, 513, 100)),
    Case("prime", B=3, H=1, C=101, D=13),
    Case("base_width", B=2, C=130, D=64),
    Case("width_96", B=2, D=96),
    Case("odd_width", B=2, C=80, D=111),
    Case("widest", B=2, H=1, C=140, D=256, lengths=(140, 131)),
    Case("grouped_queries", B=2, H=8, Hk=2),
    Case("one_key_head", B=2, H=5, Hk=1, D=24),
    Case("many_query_heads", B=2, H=40, Hk=2, D=24),
    Case("two_queries", L=2, lengths=(70, 1, 0)),
    Case("draft", B=5, L=5, lengths=(70, 64, 66, 5, 3)),
    Case("draft_grouped_queries", B=2, H=6, Hk=2, L=7, C=300, lengths=(300, 259)),
    Case("long_prefix", B=2, L=70, C=90, lengths=(90, 70)),
    Case("prefix_longer_than_the_cache", B=2, L=9, C=5, lengths=(5, 3)),
    Case("beams_side_by_side", B=3, H=4, L=4, causal=False, lengths=(70, 9, 0)),
    Case("all_queries_see_all", L=3, Hk=1, causal=False, lengths=None),
    Case("shared_rows", B=6, R=2, rows="shared"),
    Case("rows_of_a_wider_cache", B=2, R=7, rows="shared", C=300, lengths=(300, 12)),
    Case("table", B=4, rows="table"),
    Case("table_of_more_rows", B=3, R=9, C=300, rows="table", lengths=(300, 257, 0)),
    Case("table_grouped_queries", B=3, H=4, Hk=2, L=3, rows="table"),
    Case("empty_batch", B=0, lengths=None),
    Case("no_queries", L=0),
    Case("no_positions", C=0, lengths=(0, 0, 0)),
    Case("no_positions_with_table", C=0, lengths=None, rows="table"),
)


def build(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """(q, k_cache and v_cache; the other arguments) of a case."""
    B, H, L, C, D = (case.get(name, default) for name, default in zip("BHLCD", (3, 2, 1, 70, 16), strict=True))
    Hk, R = case.get("Hk", H), case.get("R", B)
    tensors = {
        "q": normal(B, H, L, D, dtype=dtype, device=device),
        "k_cache": normal(R, Hk, C, D, dtype=dtype, device=device),
        "v_cache": normal(R, Hk, C, D, dtype=dtype, device=device),
    }
    lengths = case.get("lengths", "random")
    if lengths == "random":
        lengths = torch.randint(0, C + 1, (B,), device=device)
    elif lengths is not None:
        lengths = torch.tensor(lengths, device=device)
    options = {"lengths": lengths, "causal": case.get("causal", True)}
    if "rows" in case:
        shape = (B,) if case["rows"] == "shared" else (B, C)
        options["rows"] = torch.randint(0, max(R, 1), shape, device=device, dtype=torch.int32)
    return tensors, options


def run(backend: str, tensors: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    """(out, lse) on a backend; a refusal skips the test with its sentence."""
    with torch.no_grad(), running_on(backend):
        return decode_attention_with_lse(**tensors, **options)


def assert_right(
    backend: str, tensors: dict[str, Tensor], *, any_call: bool = False, **options
) -> tuple[Tensor, Tensor]:
    """The oracle of tests/oracle.py for an op without gradients; returns what the backend gave.

    any_call: the looser bound of a random call, with room for an lse that comes out small because its parts cancel.
    """
    got = run(backend, tensors, **options)
    with torch.no_grad(), use_backend("reference"):
        exact = decode_attention_with_lse(**in_float64(tensors), **options)
        naive = decode_attention_with_lse(**tensors, **options)
    if any_call:
        assert_matches(got, exact, (naive[0], naive[1] + LOGARITHM), **BOUND)
    else:
        assert_matches(got, exact, naive)
    return got


def gathered(cache: Tensor, rows: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, H_k, C, D): the cache with every sequence's positions moved to a row of its own; NaN beyond the lengths."""
    B, C = len(rows), cache.shape[2]
    out = torch.full((B, *cache.shape[1:]), torch.nan, dtype=cache.dtype, device=cache.device)
    for b in range(B):
        for j in range(C if lengths is None else int(lengths[b])):
            out[b, :, j] = cache[int(rows[b] if rows.dim() == 1 else rows[b, j]), :, j]
    return out
