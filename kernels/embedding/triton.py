"""Embedding in Triton, for tensors on a GPU: outputs, tables of positions and launches.

triton_forward.py and triton_backward.py hold the kernels, and say how the work is cut and what bounds it.

device.py says what becomes of a token outside the vocabulary.
"""

from __future__ import annotations

import torch
import triton

from fused_transformer.kernels import _triton
from fused_transformer.kernels.embedding import triton_backward, triton_forward
from fused_transformer.kernels.embedding.device import check_tokens, chunk_of, position_source
from fused_transformer.kernels.embedding.positions import Positions


def refuses(tokens, table, positions, scale, padding_idx, dropout_p, seed) -> str | None:
    return _triton.refuses_tensors(table=table)


def forward(tokens, table, positions: Positions | None, scale, padding_idx, dropout_p, seed):
    vocabulary, width = table.shape
    out = table.new_empty(*tokens.shape, width)
    if out.numel() == 0:
        return out
    check_tokens(tokens, vocabulary)
    rows, waves = position_source(positions, tokens, width)
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
    chunk = chunk_of(count)
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
