"""What attention's Triton kernels share: which keys a tile of queries sees, and its scores with every mask applied.

A tile is some queries by some keys of one head; in the pass for dK and dV it lies transposed, so rows and columns come
as 2-D index tensors that broadcast either way. Blocks that lengths, causal and window mask whole are never visited.
EDGE tiles are those that these cut, and only there is a position compared with a limit; `keep` and `bias` are read in
every tile. Masks select, they never add: what a masked key holds is gone with its score.

Scores are in one of two units, chosen by `Blocks.NATURAL`. Folded: the plain product q·k, and exp(scale · product)
is exp2(product · factor - shift), one multiply-add. Natural: scale · product + bias, with the error of plain torch,
for float32 and for biases of any size.

Kernels are compiled without fusing products with sums (launched with enable_fp_fusion=False), and a multiply-add that
is wanted is written out: what a compiler fuses depends on what stands between, and a mask that hides nothing would
change bits. In float32, outside tensor cores, it changes some still: the order in which the lanes of a row are summed
is the compiler's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Rows(NamedTuple):
    """A (B, H, L, D) tensor, or packed (T, H, D), whose stride_b is 0."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_l: int


class Scores(NamedTuple):
    """A (B, H, L, S) mask or bias. A stride of 0 broadcasts."""

    ptr: Any
    stride_b: int  # these three hidden: they follow the batch's lengths
    stride_h: int
    stride_l: int
    stride_s: Any  # tl.constexpr where it is 1, so that loads can be wide
    one_row: Any  # tl.constexpr bool: there is one answer for all queries
    aligned: Any  # tl.constexpr bool: each row begins at a multiple of 16 elements and 16 bytes


class Mask(NamedTuple):
    """mask.Mask as the kernels take it. What is absent is None and costs nothing; causal is part of left and right."""

    q_length: int  # packed: the longest; both hidden
    k_length: int
    q_offsets_ptr: Any
    k_offsets_ptr: Any
    k_lengths_ptr: Any
    left: int | None
    right: int | None
    keep: Scores | None
    bias: Scores | None
    # tl.constexpr bool. The last field, as Triton before 3.7 forgets the constants of a tuple within a tuple in loops,
    # except where a constant of the outer one comes after.
    bottom_right: Any


class Dropout(NamedTuple):
    seed_ptr: Any
    threshold: int
    keep_scale: float


class Blocks(NamedTuple):
    """What one compiled kernel is compiled for, each a tl.constexpr."""

    M: Any  # queries of a tile
    N: Any  # keys of a tile
    WIDTH: Any  # D rounded up to a power of two
    D: Any
    GROUP: Any  # query heads of a key head
    HIDES: Any  # whether a query may not see a key that another sees
    NATURAL: Any  # the unit of scores
    PRECISION: Any  # of tl.dot


class Head(NamedTuple):
    """One head of one sequence, and where its masks begin."""

    q0: Any  # the sequence's first tokens, if the batch is packed
    k0: Any
    queries: Any
    own_keys: Any
    keys: Any  # own_keys without those beyond k_lengths
    shift: Any  # query i stands at key position i + shift
    outer: Any  # batch · heads + head, the dropout counter's
    keep_ptr: Any
    bias_ptr: Any


class Matrix(NamedTuple):
    """The rows of one head; or one number a row."""

    ptr: Any
    stride: Any


class Queries(NamedTuple):
    """What the backward passes know of a head's queries, each a Matrix."""

    q: Any
    dout: Any
    lse: Any
    delta: Any


def hidden(number: int) -> int:
    """A number ≥ 0 in a shape that Triton compiles nothing for: it would for 1, and for multiples of 16.

    do_not_specialize does not reach into tuples. Odd numbers above 1 are neither; `shown` undoes it in a kernel.
    """
    return 2 * number + 3


@triton.jit
def shown(number):
    return (number - 3) // 2


@triton.jit
def head_of(mask, batch, head, H):
    q0 = tl.cast(0, tl.int64)
    k0 = tl.cast(0, tl.int64)
    queries = shown(mask.q_length)
    own_keys = shown(mask.k_length)
    if mask.q_offsets_ptr is not None:
        q0 = tl.load(mask.q_offsets_ptr + batch)
        k0 = tl.load(mask.k_offsets_ptr + batch)
        queries = (tl.load(mask.q_offsets_ptr + batch + 1) - q0).to(tl.int32)
        own_keys = (tl.load(mask.k_offsets_ptr + batch + 1) - k0).to(tl.int32)
    keys = own_keys
    if mask.k_lengths_ptr is not None:
        keys = tl.maximum(tl.minimum(own_keys, tl.load(mask.k_lengths_ptr + batch).to(tl.int32)), 0)
    shift = 0
    if mask.bottom_right:
        shift = keys - queries
    keep_ptr = 0  # nothing reads it; Triton before 3.7 can't return None
    if mask.keep is not None:
        keep_ptr = mask.keep.ptr + batch * shown(mask.keep.stride_b) + head * shown(mask.keep.stride_h)
    bias_ptr = 0
    if mask.bias is not None:
        bias_ptr = mask.bias.ptr + batch * shown(mask.bias.stride_b) + head * shown(mask.bias.stride_h)
    return Head(q0, k0, queries, own_keys, keys, shift, batch * H + head, keep_ptr, bias_ptr)


@triton.jit
def matrix(x, batch, head, token0):
    return Matrix(x.ptr + batch * x.stride_b + head * x.stride_h + token0 * x.stride_l, x.stride_l)


@triton.jit
def numbers(ptr, mask, h, head, H):
    """The head's part of contiguous (B, H, L) statistics, or packed (T, H)."""
    if mask.q_offsets_ptr is not None:
        return Matrix(ptr + head.q0 * H + h, H)
    else:
        return Matrix(ptr + head.outer * head.queries, 1)


@triton.jit
def queries_of(q, dout, lse_ptr, delta_ptr, mask, batch, h, head, H):
    return Queries(
        matrix(q, batch, h, head.q0),
        matrix(dout, batch, h, head.q0),
        numbers(lse_ptr, mask, h, head, H),
        numbers(delta_ptr, mask, h, head, H),
    )


@triton.jit
def seen(first, last, count, shift, left, right, BLOCK: tl.constexpr):
    """What positions first ... last see of `count`: (low, full_low, full_high, high).

    None sees anything outside low ... high; all see all of full_low ... full_high, which is whole blocks. For what keys
    are seen by, in place of what queries see, shift is negated and left and right are exchanged.
    """
    low = 0
    full_low = 0
    high = count
    full_high = count
    if right is not None:
        high = tl.minimum(count, last + shift + right + 1)
        full_high = tl.minimum(count, first + shift + right + 1)
    if left is not None:
        low = tl.maximum(first + shift - left, 0) // BLOCK * BLOCK
        full_low = tl.cdiv(tl.maximum(last + shift - left, 0), BLOCK) * BLOCK
    full_high = tl.maximum(full_high, 0) // BLOCK * BLOCK
    some = full_low < full_high
    return low, tl.where(some, full_low, low), tl.where(some, full_high, low), high


@triton.jit
def load_tile(x, first, count, blocks, BLOCK: tl.constexpr, EDGE: tl.constexpr, only=None):
    """[BLOCK, WIDTH]: a matrix's rows from `first`; zero beyond D and, in an EDGE tile, from row `count` on.

    only: [BLOCK] bool, which of the rows of an EDGE tile are read; the others are zero.
    """
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, blocks.WIDTH)[None, :]
    ptrs = x.ptr + tl.cast(first, tl.int64) * x.stride + (rows * x.stride + cols)
    if EDGE:
        read = first + rows < count
        if only is not None:
            read = read & only[:, None]
        if blocks.WIDTH != blocks.D:
            read = read & (cols < blocks.D)
        return tl.load(ptrs, mask=read, other=0.0)
    elif blocks.WIDTH != blocks.D:
        return tl.load(ptrs, mask=cols < blocks.D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(x, first, count, tile, blocks, BLOCK: tl.constexpr):
    """Stores those rows of `tile` that come before row `count` of the matrix."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, blocks.WIDTH)[None, :]
    ptrs = x.ptr + tl.cast(first, tl.int64) * x.stride + (rows * x.stride + cols)
    tl.store(ptrs, tile.to(x.ptr.dtype.element_ty), mask=(first + rows < count) & (cols < blocks.D))


@triton.jit
def load_numbers(x, rows, count, other, EDGE: tl.constexpr):
    """One number of each of `rows`; `other` from row `count` on, in an EDGE tile."""
    ptrs = x.ptr + rows * x.stride
    if EDGE:
        return tl.load(ptrs, mask=rows < count, other=other)
    else:
        return tl.load(ptrs)


@triton.jit
def store_numbers(x, rows, count, numbers):
    tl.store(x.ptr + rows * x.stride, numbers, mask=rows < count)


@triton.jit
def load_scores(ptr, x, head, first_row, first_col, rows, cols, EDGE: tl.constexpr):
    """The tile of a mask or bias. What lies beyond the sequence repeats its last row or column."""
    ptr += tl.cast(first_col, tl.int64) * x.stride_s
    if EDGE:
        cols = tl.minimum(cols, head.keys - 1 - first_col)
    offset = cols * x.stride_s
    if not x.one_row:
        stride_l = shown(x.stride_l)
        if x.aligned:
            stride_l = tl.multiple_of(stride_l, 16)
            ptr = tl.multiple_of(ptr, 16)
        ptr += tl.cast(first_row, tl.int64) * stride_l
        offset = tl.minimum(rows, head.queries - 1 - first_row) * stride_l + offset
    return tl.load(ptr + offset)


@triton.jit
def masked(score, head, mask, first_row, first_col, rows, cols, EDGE: tl.constexpr):
    """The scores of a tile with the bias added, -inf where masked. rows, cols: 2-D, counted from the tile's first."""
    if mask.bias is not None:
        bias = load_scores(head.bias_ptr, mask.bias, head, first_row, first_col, rows, cols, EDGE).to(tl.float32)
        score = tl.where(bias == -INF, -INF, score + bias)
    if mask.keep is not None:
        keep = load_scores(head.keep_ptr, mask.keep, head, first_row, first_col, rows, cols, EDGE)
        score = tl.where(keep != 0, score, -INF)
    if EDGE:
        visible = (cols < head.keys - first_col) & (rows < head.queries - first_row)
        position = first_row + head.shift - first_col
        if mask.right is not None:
            visible = visible & (cols <= rows + (position + mask.right))
        if mask.left is not None:
            visible = visible & (cols >= rows + (position - mask.left))
        score = tl.where(visible, score, -INF)
    return score


@triton.jit
def shift_of(lse, blocks):
    """What `exponential` subtracts: lse in the unit of the scores, and infinity where a row has no weights."""
    shift = tl.where(lse == -INF, INF, lse)
    if not blocks.NATURAL:
        shift = shift * LOG2E
    return shift


@triton.jit
def exponential(score, shift, scale, blocks):
    """exp(score - shift), natural or folded both."""
    if blocks.NATURAL:
        return tl.exp2((score - shift) * LOG2E)
    else:
        return tl.exp2(tl.fma(score, scale * LOG2E, -shift))


@triton.jit
def finite_or_zero(x):
    x32 = x.to(tl.float32)
    return tl.where(tl.abs(x32) < INF, x32, 0.0).to(x.dtype)


@triton.jit
def any_unfinite(x):
    """Whether a [M, N] float32 tile holds NaN or an infinity."""
    return tl.max(tl.where(tl.abs(x) < INF, 0, 1)) > 0
