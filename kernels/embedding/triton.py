"""Embedding in Triton, for tensors on a GPU: outputs, tables of positions and launches.

triton_forward.py and triton_backward.py hold the kernels, and say how the work is cut and what bounds it.

A token outside the vocabulary: to raise IndexError the host would have to wait for the GPU at every call. So there its
row of the output is NaN (where dropout leaves anything), which no loss survives unseen, it gives no gradient, and no
memory outside the table is read or written. (torch's own embedding fails a device-side assertion, after which the
process can't use the GPU any more.) In the interpreter, on CPU tensors, it is an IndexError as in the other backends.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from fused_transformer.kernels import _triton
from fused_transformer.kernels.embedding import triton_backward, triton_forward
from fused_transformer.kernels.embedding.errors import bad_token
from fused_transformer.kernels.embedding.positions import Positions, cached_table, column_waves


def refuses(tokens, table, positions, scale, padding_idx, dropout_p, seed) -> str | None:
    return _triton.refuses_tensors(table=table)


def forward(tokens, table, positions: Positions | None, scale, padding_idx, dropout_p, seed):
    vocabulary, width = table.shape
    out = table.new_empty(*tokens.shape, width)
    if out.numel() == 0:
        return out
    if tokens.device.type == "cpu":
        _check(tokens, vocabulary)
    rows = waves = None
    if positions is not None:
        if positions.end is not None:
            rows = cached_table(positions.layout, width, positions.end, tokens.device)
        if rows is None:
            waves = _waves(positions.layout, width, tokens.device)
    block_m, block_n = triton_forward.tile(width)
    count = tokens.numel()
    with _triton.current(table):
        triton_forward.embedding_forward_kernel[(triton.cdiv(count, block_m), triton.cdiv(width, block_n))](
            *(tokens, table, rows, waves),
            *(positions.ids if positions else None, positions.starts if positions else None, seed, out),
            *(count, tokens.shape[-1] if tokens.dim() else 1, vocabulary, width, table.stride(0)),
            *(positions.start if positions else 0, padding_idx, scale, *_triton.dropout_numbers(seed, dropout_p)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=triton_forward.WARPS,
        )
    return out


def backward(dout, tokens, vocabulary, scale, padding_idx, dropout_p, seed):
    count, width = tokens.numel(), dout.shape[-1]
    dtable = dout.new_zeros(vocabulary, width)
    if count == 0 or dtable.numel() == 0:
        return dtable
    dout = dout.reshape(count, width)
    ordered, order = torch.sort(tokens.flatten(), stable=True)
    chunk = triton_backward.chunk_of(count)
    chunks = triton.cdiv(count, chunk)
    partial = dout.new_empty(2, chunks, width, dtype=torch.float32)
    with _triton.current(dout):
        block_m, block_n = triton_backward.run_tile(width)
        triton_backward.embedding_backward_kernel[(count, triton.cdiv(width, block_n))](
            *(dout, ordered, order, seed, dtable, partial),
            *(count, vocabulary, width, chunk, dout.stride(0)),
            *(padding_idx, scale, *_triton.dropout_numbers(seed, dropout_p)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=triton_backward.RUN_WARPS,
        )
        if chunks > 1:
            block_m, block_n = triton_backward.MERGE_TILE
            triton_backward.embedding_backward_merge_kernel[(chunks, triton.cdiv(width, block_n))](
                *(ordered, partial, dtable, count, vocabulary, width, chunk, padding_idx, scale),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=triton_backward.MERGE_WARPS,
            )
    return dtable


def _check(tokens: Tensor, vocabulary: int) -> None:
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        raise bad_token(tokens, int(outside.flatten().nonzero()[0]), vocabulary)


@cache
def _waves(layout: str, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return column_waves(layout, width, device)
