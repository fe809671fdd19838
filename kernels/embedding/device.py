"""What the embedding's backends on a GPU share: where positions come from, where runs of tokens are cut, bad tokens.

A token outside the vocabulary: to raise IndexError the host would have to wait for the GPU at every call. So there its
row of the output is NaN (where dropout leaves anything), which no loss survives unseen, it gives no gradient, and no
memory outside the table is read or written. (torch's own embedding fails a device-side assertion, after which the
process can't use the GPU any more.) On CPU tensors, which these kernels take where tests run them without a GPU, it is
an IndexError as in the other backends.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fused_transformer.kernels.embedding.errors import bad_token
from fused_transformer.kernels.embedding.positions import Positions, cached_table, column_waves

SMALLEST_CHUNK = 32


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """IndexError if a token on the CPU is outside the vocabulary."""
    if tokens.device.type != "cpu":
        return
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        raise bad_token(tokens, int(outside.flatten().nonzero()[0]), vocabulary)


def position_source(positions: Positions | None, tokens: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
    """(rows, None): the table in which positions are looked up. (None, waves): they are computed from `column_waves`,
    where the largest is not known to the host, or their table would be too large to keep. (None, None): there are none.
    """
    if positions is None:
        return None, None
    if positions.end is not None:
        rows = cached_table(positions.layout, width, positions.end, tokens.device)
        if rows is not None:
            return rows, None
    return None, _waves(positions.layout, width, tokens.device)


@cache
def _waves(layout: str, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return column_waves(layout, width, device)


def chunk_of(count: int) -> int:
    """After how many sorted tokens a run is cut, a power of two: near √count / 2, so that neither a chunk nor the
    chunks of a run take long."""
    return max(SMALLEST_CHUNK, 1 << (max(1, math.isqrt(count) // 2) - 1).bit_length())
