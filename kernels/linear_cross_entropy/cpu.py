"""linear_cross_entropy for CPU tensors: a chunk of tokens at a time, losses by csrc/cross_entropy, products by torch
(or kernels/matmul.py, where that is quicker).

How the work is cut. A chunk's logits are overwritten by their gradient, which is multiplied into the gradients of
hidden, weight and bias, and its memory is the next chunk's. dweight, (V, E) in float32, is read and written once a
chunk: with E tokens in a chunk that is 8 bytes for 6 E operations, and the logits take no more memory than it does.

What bounds it: the products, 6 V E operations a token with gradients. The logits pass through memory about six times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _native, matmul
from fused_transformer.kernels.cross_entropy import op as cross_entropy
from fused_transformer.kernels.linear_cross_entropy import CHUNK_ROWS
from fused_transformer.kernels.linear_cross_entropy.operands import operand
from fused_transformer.kernels.memory import empty_result

_C = _native.library()

CHUNK_BYTES = 2**24  # of logits: at least as many, for products whose rows are worth the reading of weight
SUMMED_ROWS = 4096  # of a 16-bit product at a time: torch makes a float32 copy of what it adds to a float32 sum


def refuses(hidden, weight, *_args) -> str | None:
    return _native.refuses_tensors("cpu", hidden=hidden, weight=weight)  # bias was checked against them


def forward(hidden, weight, bias, targets, dtype, *rest):
    weight, bias = operand(weight, dtype), operand(bias, dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    for part, logits in _chunks(hidden, weight, dtype, 0):
        _product(operand(hidden[part], dtype), weight, bias, logits)
        losses[part] = _losses_of(logits, targets[part], rest).forward(logits, targets[part], *rest)[0]
    return losses


def backward(dlosses, hidden, weight, bias, targets, dtype, *rest_and_wanted):
    """The losses, and the gradients of hidden, weight and bias where wanted, of any dtype."""
    *rest, wanted = rest_and_wanted
    weight, bias = operand(weight, dtype), operand(bias, dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape, dtype=dtype) if wanted[0] else None
    dweight = _Sum() if wanted[1] else None
    dbias = weight.new_zeros(len(weight), dtype=torch.float32) if wanted[2] else None
    for part, logits in _chunks(hidden, weight, dtype, 4 * weight.shape[1] // dtype.itemsize):
        rows = operand(hidden[part], dtype)
        _product(rows, weight, bias, logits)
        kernel = _losses_of(logits, targets[part], rest)
        losses[part], *statistics = kernel.forward(logits, targets[part], *rest)
        dlogits = kernel.backward(dlosses[part], logits, targets[part], *statistics, *rest, True)
        if dhidden is not None:
            _product(dlogits, weight.t(), None, dhidden[part])
        if dweight is not None:
            dweight.add_product(dlogits.t(), rows)
        if dbias is not None:
            dbias += dlogits.sum(0)
    if dweight is not None and dweight.total is None:  # no tokens
        dweight.total = torch.zeros_like(weight)
    return losses, dhidden, None if dweight is None else dweight.total, dbias


class _Sum:
    """A sum of products: float32 from the second one on. Those of 16 bits by torch are rounded to these, one by one."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        if a.dtype in matmul.QUICKER:
            total = self.total
            if total is None:
                total = empty_result(len(a), b.shape[1], like=a, dtype=torch.float32)
            self.total = matmul.product(a, b.t(), out=total, add=self.total is not None)
        elif self.total is None:
            self.total = torch.mm(a, b, out=empty_result(len(a), b.shape[1], like=a))
        elif a.dtype == torch.float32:
            self.total.addmm_(a, b)
        else:
            self.total = self.total.float()  # which is nothing from the third on
            for first in range(0, len(a), SUMMED_ROWS):
                part = slice(first, first + SUMMED_ROWS)
                self.total[part] += torch.mm(a[part], b)


def _chunks(hidden: Tensor, weight: Tensor, dtype: torch.dtype, least: int):
    """(the rows, as a slice; memory for their logits) of chunks that are as equal as can be, `least` rows or more."""
    rows, vocabulary = len(hidden), len(weight)
    most = max(CHUNK_ROWS, least, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    chunks = -(-rows // most)
    size = -(-rows // max(chunks, 1))
    memory = empty_result(size, vocabulary, like=hidden, dtype=dtype)
    for first in range(0, rows, max(size, 1)):
        count = min(size, rows - first)
        yield slice(first, first + count), memory[:count]


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if out.dtype in matmul.QUICKER and len(rows) >= matmul.LEAST_ROWS[out.dtype]:
        matmul.product(rows, weight, bias, out=out)
    elif bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _losses_of(logits: Tensor, targets: Tensor, rest):
    return cross_entropy.pick(logits, targets, *rest)
