"""Embedding forward in Triton: a program gathers a few tokens' rows of the table and writes rows of out.

It moves 2 E elements a token; the positions' rows (4 E bytes) come out of the cache. Bound by memory, except where
positions are computed: that is 25 float64 operations an element, which are cheap on data-centre GPUs alone.

Positions are computed where the largest is not known to the host (`start` or `position_ids` on a GPU: to look would be
to wait for it), or where a table of them would be too large to keep. The angle is rounded to float64 as in `sinusoids`
and its sine is right to 1e-15, so that the float32 numbers added are those of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_transformer.kernels import _triton

WARPS = 1  # as many loads as the warps of a multiprocessor can have under way, and no barrier
ELEMENTS = 1024  # of a program's tile: 32 a thread, 4 loads of 16 bytes in bfloat16

# π/2 in three parts, of which the first two have 33 bits: times a whole number below 2^20 they are exact.
HALF_PI_1 = tl.constexpr(float.fromhex("0x1.921fb544p+0"))
HALF_PI_2 = tl.constexpr(float.fromhex("0x1.0b4611a6p-34"))
HALF_PI_3 = tl.constexpr(float.fromhex("0x1.3198a2e037073p-69"))
TWO_OVER_PI = tl.constexpr(float.fromhex("0x1.45f306dc9c883p-1"))


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of two."""
    cols = min(ELEMENTS, max(16, triton.next_power_of_2(width)))
    return ELEMENTS // cols, cols


@triton.jit
def _sine(angle, quarters):
    """sin(angle + quarters · π/2) in float64, by Taylor's series of sine and cosine around the nearest quarter turn."""
    nearest = tl.floor(angle * TWO_OVER_PI + 0.5)
    x = ((angle - nearest * HALF_PI_1) - nearest * HALF_PI_2) - nearest * HALF_PI_3
    z = x * x
    sine = z * (-1 / 1307674368000) + (1 / 6227020800)  # 1/15!, 1/13! ...: the next would add 5e-17 at π/4
    sine = sine * z - 1 / 39916800
    sine = sine * z + 1 / 362880
    sine = sine * z - 1 / 5040
    sine = sine * z + 1 / 120
    sine = sine * z - 1 / 6
    sine = x + x * (z * sine)
    cosine = z * (1 / 20922789888000) - 1 / 87178291200  # 1/16!, 1/14! ...
    cosine = cosine * z + 1 / 479001600
    cosine = cosine * z - 1 / 3628800
    cosine = cosine * z + 1 / 40320
    cosine = cosine * z - 1 / 720
    cosine = cosine * z + 1 / 24
    cosine = cosine * z - 0.5
    cosine = 1.0 + z * cosine
    quadrant = nearest.to(tl.int64) + quarters
    value = tl.where(quadrant % 2 != 0, cosine, sine)
    return tl.where((quadrant & 2) != 0, -value, value)


@triton.jit(do_not_specialize=["count", "length", "vocabulary", "start", "padding_idx", "threshold"])
def embedding_forward_kernel(
    tokens_ptr,
    table_ptr,
    positions_ptr,
    waves_ptr,
    ids_ptr,
    starts_ptr,
    seed_ptr,
    out_ptr,
    count,
    length,
    vocabulary,
    width,
    stride_table_v,
    start,
    padding_idx,
    scale,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grid (ceil(count / BLOCK_M), ceil(width / BLOCK_N)): a program makes BLOCK_M rows, BLOCK_N columns of them.

    positions_ptr: (P, width) float32, their table. waves_ptr: (2, width) float64, if they are computed: the frequency
        of each column, and the quarter turns added to its angle (1 makes a cosine of a sine). Neither: no positions.
    ids_ptr: (count,) int64, the positions; None: row n has position start + starts_ptr[n // length] + n % length,
        starts_ptr None: 0. padding_idx: None, if there is none. Tokens outside the vocabulary read NaN.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < count
    mask_n = offs_n < width
    mask = mask_m[:, None] & mask_n[None, :]
    token = tl.load(tokens_ptr + offs_m, mask_m, -1).to(tl.int64)
    inside = (token >= 0) & (token < vocabulary)
    there = inside[:, None] & mask_n[None, :]
    row = tl.load(table_ptr + token[:, None] * stride_table_v + offs_n[None, :], there, float("nan"))
    out = row.to(tl.float32) * scale  # [BLOCK_M, BLOCK_N]

    if positions_ptr is not None or waves_ptr is not None:
        if ids_ptr is not None:
            position = tl.load(ids_ptr + offs_m, mask_m, 0)
        else:
            position = offs_m % length + start
            if starts_ptr is not None:
                position += tl.load(starts_ptr + offs_m // length, mask_m, 0)
        if positions_ptr is not None:
            out += tl.load(positions_ptr + position[:, None] * width + offs_n[None, :], mask, 0.0)
        else:
            frequency = tl.load(waves_ptr + offs_n, mask_n, 0.0)
            quarters = tl.load(waves_ptr + width + offs_n, mask_n, 0.0).to(tl.int64)
            out += _sine(position.to(tl.float64)[:, None] * frequency[None, :], quarters[None, :]).to(tl.float32)
    if seed_ptr is not None:
        kept = _triton.kept(tl.load(seed_ptr), threshold, 0, offs_m, first_n, BLOCK_N)
        out = tl.where(kept, out * keep_scale, 0.0)
    if padding_idx is not None:
        out = tl.where((token != padding_idx)[:, None], out, 0.0)
    tl.store(out_ptr + offs_m[:, None] * width + offs_n[None, :], out.to(out_ptr.dtype.element_ty), mask)
