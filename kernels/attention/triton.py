"""Attention in Triton: flash-style kernels for every mask. This file allocates and launches.

| kernel                     | a program owns                  | file                |
|----------------------------|---------------------------------|---------------------|
| attention_forward_kernel   | some queries of a head          | triton_forward.py   |
| attention_dq_kernel        | some queries of a head          | triton_backward.py  |
| attention_dkdv_kernel      | some keys of a key head         | triton_backward.py  |
| attention_dbias_kernel     | a tile of the bias              | triton_bias.py      |
| attention_weights_kernel   | a tile of the weights           | triton_weights.py   |

triton_tiles.py says what they share, triton_config.py how large their tiles are (or triton_autotune.py, if asked to).
Each element is written by one program, in an order of sums that neither batch nor length changes: a row has the same
bits whatever else is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_transformer.kernels import _triton
from fused_transformer.kernels._checks import empty_rows_like
from fused_transformer.kernels.attention import triton_tiles as tiles
from fused_transformer.kernels.attention.mask import Mask
from fused_transformer.kernels.attention.triton_autotune import tiles_for
from fused_transformer.kernels.attention.triton_backward import attention_dkdv_kernel, attention_dq_kernel
from fused_transformer.kernels.attention.triton_bias import attention_dbias_kernel
from fused_transformer.kernels.attention.triton_config import Config, config
from fused_transformer.kernels.attention.triton_forward import attention_forward_kernel
from fused_transformer.kernels.attention.triton_weights import attention_weights_kernel

_FAR = 2**30  # farther than any position, and twice as far is int32 still


def refuses(q, k, v, mask: Mask, scale, dropout_p, seed) -> str | None:
    if q.shape[-1] > 256 or q.shape[-1] < 1:
        return f"the head width must be 1 ... 256, got {q.shape[-1]}"
    return _triton.refuses_tensors(q=q, k=k, v=v, bias=mask.bias)


def forward(q, k, v, mask: Mask, scale, dropout_p, seed):
    q, k, v = _near(q), _near(k), _near(v)
    out = _new(q, mask)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if mask.packed:
        lse.fill_(-torch.inf)
    q, scale, _ = _with_positive_scale(q, scale)
    heads = q.shape[1]
    inputs = _rows(q), _rows(k), _rows(v), _mask(mask), _dropout(dropout_p, seed)
    outputs = _rows(out), lse

    def launch(chosen: Config) -> None:
        blocks = triton.cdiv(mask.q_length, chosen.m)
        sizes = heads, blocks, scale, _blocks(q, k, mask, chosen)
        _launch(attention_forward_kernel, blocks * mask.batch * heads, chosen, q, *inputs, *outputs, *sizes)

    kernel = "forward with scores" if _reads_scores(mask, q) or dropout_p else "forward"
    launch(tiles_for(kernel, q, mask, dropout_p, launch))
    return out, lse


def backward(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    q, k, v, out, dout = (_near(x) for x in (q, k, v, out, dout))
    dq, dk, dv = (_new(x, mask) for x in (q, k, v))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    q, scale, sign = _with_positive_scale(q, scale)
    heads, k_heads = q.shape[1], k.shape[1]
    inputs = _rows(q), _rows(k), _rows(v), _mask(mask), _dropout(dropout_p, seed)
    saved = _rows(dout), lse, delta

    def launch_dq(chosen: Config) -> None:
        blocks = triton.cdiv(mask.q_length, chosen.m)
        tensors = *inputs, _rows(out), *saved, _rows(dq)
        sizes = heads, blocks, scale, _blocks(q, k, mask, chosen)
        _launch(attention_dq_kernel, blocks * mask.batch * heads, chosen, q, *tensors, *sizes)

    def launch_dkdv(chosen: Config) -> None:
        blocks = triton.cdiv(mask.k_length, chosen.n)
        tensors = *inputs, *saved, _rows(dk), _rows(dv)
        sizes = heads, blocks, scale, _blocks(q, k, mask, chosen)
        _launch(attention_dkdv_kernel, blocks * mask.batch * k_heads, chosen, q, *tensors, *sizes)

    launch_dq(tiles_for("dq", q, mask, dropout_p, launch_dq))  # the first, as it writes delta
    launch_dkdv(tiles_for("dkdv", q, mask, dropout_p, launch_dkdv))

    dbias = None
    if wants_dbias:
        dbias = _bias_gradient(q, k, mask, scale, inputs, saved)
    return dq if sign == 1 else dq * sign, dk, dv, dbias


def weights(q, k, lse, mask: Mask, scale, dropout_p, seed):
    q, k = _near(q), _near(k)
    probabilities = torch.empty((*q.shape[:3], mask.k_length), dtype=q.dtype, device=q.device)
    q, scale, _ = _with_positive_scale(q, scale)
    chosen = config("tile", q)
    heads, blocks_m, blocks_n = q.shape[1], triton.cdiv(mask.q_length, chosen.m), triton.cdiv(mask.k_length, chosen.n)
    inputs = _rows(q), _rows(k), _mask(mask), _dropout(dropout_p, seed), lse
    sizes = heads, blocks_m, blocks_n, scale, _blocks(q, k, mask, chosen)
    programs = blocks_n * blocks_m * mask.batch * heads
    _launch(attention_weights_kernel, programs, chosen, q, *inputs, probabilities, *sizes)
    return probabilities


def _bias_gradient(q, k, mask: Mask, scale, inputs, saved) -> Tensor:
    chosen = config("tile", q)
    b, h, length, keys = shape = tuple(mask.bias.shape)
    batches = mask.batch if b == 1 else 1
    heads = q.shape[1] if h == 1 else 1
    owned = b * h * triton.cdiv(length, chosen.m) * triton.cdiv(keys, chosen.n)
    # Two programs a multiprocessor, if there are sums to split.
    parts = max(1, min(batches * heads, 2 * _triton.multiprocessors(q.device) // max(1, owned)))
    pairs = triton.cdiv(batches * heads, parts)
    dbias = torch.empty((parts, *shape), dtype=torch.float32, device=q.device)
    sizes = q.shape[1], *shape, batches, heads, pairs, scale, _blocks(q, k, mask, chosen)
    sums = length == 1 and mask.q_length != 1, keys == 1 and mask.k_length != 1
    _launch(attention_dbias_kernel, parts * owned, chosen, q, *inputs, *saved, dbias, *sizes, *sums)
    return (dbias[0] if parts == 1 else dbias.sum(0)).to(mask.bias.dtype)


def _reads_scores(mask: Mask, q: Tensor) -> bool:
    """Whether a tile of scores needs as many registers for its masks."""
    if mask.keep is None:
        return mask.bias is not None
    # One answer for all queries is a row of registers, which 10.x alone has no room for among 128 a thread.
    return mask.bias is not None or mask.keep.shape[2] != 1 or _triton.capability(q.device)[0] == 10


def _launch(kernel, programs: int, chosen: Config, q: Tensor, *args) -> None:
    options: dict = {"maxnreg": chosen.registers} if chosen.registers else {}
    options["enable_fp_fusion"] = False  # triton_tiles.py says why
    if programs > 0:
        with _triton.current(q):
            kernel[(programs,)](*args, num_warps=chosen.warps, num_stages=chosen.stages, **options)


def _new(x: Tensor, mask: Mask) -> Tensor:
    # The kernels write the rows of all sequences, but not packed tokens that belong to none.
    return empty_rows_like(x).zero_() if mask.packed else empty_rows_like(x)


def _near(x: Tensor) -> Tensor:
    """x, or a dense copy where rows lie so far apart that offsets within a tile of up to 128 would not be int32."""
    row = x.stride(2 if x.dim() == 4 else 0)
    return x if row < _FAR // 64 else x.contiguous()


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q', scale', sign) with scale' · q' = scale · q and scale' > 0: maxima of products are maxima of scores then."""
    if scale > 0.0:
        return q, scale, 1
    return (-q, -scale, -1) if scale < 0.0 else (q * 0.0, 1.0, 0)


# ---------------------------------------------------------------- arguments as the kernels take them


def _blocks(q: Tensor, k: Tensor, mask: Mask, chosen: Config) -> tiles.Blocks:
    head_width, group = q.shape[-1], q.shape[1] // k.shape[1]
    width = max(16, triton.next_power_of_2(head_width))
    natural = q.dtype == torch.float32 or mask.bias is not None
    hides = bool(mask.causal) or max(mask.window) >= 0 or mask.keep is not None or mask.bias is not None
    values = (chosen.m, chosen.n, width, head_width, group, hides, natural, _triton.dot_precision())
    return tiles.Blocks(*map(tl.constexpr, values))


def _rows(x: Tensor) -> tiles.Rows:
    """A (B, H, L, D) or packed (T, H, D) tensor."""
    if x.dim() == 4:
        return tiles.Rows(x, *x.stride()[:3])
    row, head, _ = x.stride()
    return tiles.Rows(x, 0, head, row)


def _mask(mask: Mask) -> tiles.Mask:
    left, right = (None if far < 0 else min(far, _FAR) for far in mask.window)
    if mask.causal:
        right = 0
    return tiles.Mask(
        q_length=tiles.hidden(mask.q_length),
        k_length=tiles.hidden(mask.k_length),
        q_offsets_ptr=mask.q_offsets,
        k_offsets_ptr=mask.k_offsets,
        k_lengths_ptr=mask.k_lengths,
        left=left,
        right=right,
        keep=None if mask.keep is None else _scores(mask.keep.view(torch.uint8), mask),
        bias=None if mask.bias is None else _scores(mask.bias, mask),
        bottom_right=tl.constexpr(mask.causal == "bottom_right"),
    )


def _scores(x: Tensor, mask: Mask) -> tiles.Scores:
    if max(x.stride()[2:]) >= _FAR // 64:  # as in _near
        x = x.contiguous()
    b, h, row, col = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if mask.k_length == 1:
        col = 1  # any stride will do: take the one that most masks have, so that one kernel serves
    one_row = x.shape[2] == 1
    aligned = not one_row and col == 1 and x.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in (b, h, row))
    return tiles.Scores(
        ptr=x,
        stride_b=tiles.hidden(b),
        stride_h=tiles.hidden(h),
        stride_l=tiles.hidden(row),
        stride_s=tl.constexpr(1) if col == 1 else col,
        one_row=tl.constexpr(one_row),
        aligned=tl.constexpr(aligned),
    )


def _dropout(dropout_p: float, seed: Tensor | None) -> tiles.Dropout | None:
    if dropout_p == 0.0:
        return None
    return tiles.Dropout(seed, *_triton.dropout_numbers(seed, dropout_p))
