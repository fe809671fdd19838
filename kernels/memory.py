"""Memory for what a translation writes again and again: caches, logits, the rows between two products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_transformer.kernels import _native

LEAST_BYTES = 2**20  # smaller tensors are malloc's, which keeps them at hand itself


def empty_pages(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised memory of this shape, of `like`'s dtype and device.

    On a CPU it lies on pages of 2 MiB where the system gives them: with 4 KiB a head's few keys are a page of their
    own, each to be looked up. And it is used again once it is freed: malloc gives blocks of this size back to the
    system, which clears each page anew at the next use. Kept is never more than was in use at once, and the system may
    have it when it runs short.
    """
    nbytes = math.prod(shape) * like.dtype.itemsize
    eager = type(like) is Tensor and not torch.compiler.is_compiling()
    if nbytes < LEAST_BYTES or not eager or like.device.type != "cpu" or not _native.available():
        return like.new_empty(shape)
    return torch.frombuffer(_native.library().Pages(nbytes), dtype=like.dtype).view(shape)


def empty_keys_and_values(layers: int, rows: int, heads: int, positions: int, width: int, *, like: Tensor) -> Tensor:
    """`empty_pages` for a cache, as (layers, 2, rows, heads, positions, width).

    On a CPU a position's value lies behind its key: then what a query reads of a head is one stretch of memory, where
    the processor looks ahead by itself, and twice as long where beams have scattered it.
    """
    if like.device.type != "cpu":
        return empty_pages(layers, 2, rows, heads, positions, width, like=like)
    return empty_pages(layers, rows, heads, positions, 2, width, like=like).permute(0, 4, 1, 2, 3, 5)
