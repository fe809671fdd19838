"""Memory that is used again once it is freed: of what a translation writes at each step, and of large results.

malloc gives blocks beyond 32 MB back to the system when they are freed, and the system clears each page of the next one
when it is first touched: writing 32 MB takes 17 ms on two threads of a Zen 3, of which 2.2 are writing. So it does with
smaller ones at the end of its heap, results of 8 MB one after another, say. Here blocks are kept, never more
than was in use at once, and the system may have them when it runs short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_transformer.kernels import _native

LEAST_BYTES = 2**20  # of what is written at each step; smaller tensors are malloc's
LARGE_BYTES = 2**22  # results from here on: kLargeBytes of csrc/common/bind_direct_results.cpp


def empty_pages(*shape: int, like: Tensor) -> Tensor:
    """Uninitialised memory of this shape, of `like`'s dtype and device.

    On a CPU it lies on pages of 2 MiB where the system gives them: with 4 KiB a head's few keys are a page of their
    own, each to be looked up.
    """
    nbytes = math.prod(shape) * like.dtype.itemsize
    if nbytes < LEAST_BYTES or not _may_be_pages(like):
        return like.new_empty(shape)
    return _on_pages(shape, (), like.dtype)


def empty_result(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype), in reused memory if it is large."""
    dtype = dtype or like.dtype
    if math.prod(shape) * dtype.itemsize < LARGE_BYTES or not _may_be_pages(like) or _torch_fills():
        return like.new_empty(shape, dtype=dtype)
    return _on_pages(shape, (), dtype)


def empty_result_like(x: Tensor, dtype: torch.dtype | None = None, *, contiguous: bool = True) -> Tensor:
    """torch.empty_like(x, dtype=dtype), in reused memory if it is large; contiguous: whatever the strides of x are."""
    dtype = dtype or x.dtype
    form = torch.contiguous_format if contiguous else torch.preserve_format
    if x.numel() * dtype.itemsize < LARGE_BYTES or not _may_be_pages(x) or _torch_fills():
        return torch.empty_like(x, dtype=dtype, memory_format=form)
    strides = torch.empty_like(x, memory_format=form, device="meta").stride()  # dense, in some order
    return _on_pages(x.shape, strides, dtype)


def _may_be_pages(like: Tensor) -> bool:
    plain = type(like) is Tensor or type(like) is torch.nn.Parameter
    return plain and not torch.compiler.is_compiling() and like.device.type == "cpu" and _native.available()


def _torch_fills() -> bool:
    """Whether torch fills what it allocates, for programs that must not depend on what lay there."""
    fills = getattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # which its stubs do not know
    return torch.are_deterministic_algorithms_enabled() and fills


def _on_pages(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Strides (): contiguous. A tensor that is no view, since a result may be written into by whoever gets it."""
    memory = torch.frombuffer(_native.library().Pages(math.prod(shape) * dtype.itemsize), dtype=torch.uint8)
    result = torch.empty(0, dtype=dtype, device="cpu")
    return result.set_(memory.untyped_storage(), 0, tuple(shape), tuple(strides))


def empty_keys_and_values(layers: int, rows: int, heads: int, positions: int, width: int, *, like: Tensor) -> Tensor:
    """`empty_pages` for a cache, as (layers, 2, rows, heads, positions, width).

    On a CPU a position's value lies behind its key: then what a query reads of a head is one stretch of memory, where
    the processor looks ahead by itself, and twice as long where beams have scattered it.
    """
    if like.device.type != "cpu":
        return empty_pages(layers, 2, rows, heads, positions, width, like=like)
    return empty_pages(layers, rows, heads, positions, 2, width, like=like).permute(0, 4, 1, 2, 3, 5)
