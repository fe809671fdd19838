"""A linear layer, forward and backward, where this package's layers take their own product and not torch's.

Which dtypes these are the processor decides (kernels/matmul.py); of the others there is no row, since layers call
torch there. Operations: the three products. Bytes: x, weight and the upstream gradient read, y and both gradients
written. In 16 bits there are few rows of x: without instructions for them torch does less than 1 GFLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from bench import shapes
from bench.agreement import forward_backward
from fused_transformer.kernels import matmul
from fused_transformer.products import linear


@dataclass(frozen=True)
class Layer:
    """M tokens of width K become as many of width N."""

    model: str
    tokens: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} M{self.tokens} K{self.inputs} N{self.outputs}{shapes.suffix(self.dtype)}"

    @property
    def flops(self) -> int:
        return 6 * self.tokens * self.inputs * self.outputs

    @property
    def bytes(self) -> int:
        tensors = 2 * self.tokens * (self.inputs + self.outputs) + 2 * self.inputs * self.outputs
        return tensors * self.dtype.itemsize


SHAPES = [
    Layer("transformer-base", 2048, 512, 2048),
    Layer("transformer-base", 128, 512, 2048, dtype=torch.bfloat16),
    Layer("transformer-base", 128, 512, 2048, dtype=torch.float16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_forward_backward(compare, shape, device):
    if device != "cpu" or shape.dtype not in matmul.QUICKER:
        pytest.skip(f"torch's products of {shape.dtype} are what layers call here")
    x = torch.randn(shape.tokens, shape.inputs).to(shape.dtype).requires_grad_()
    weight = (torch.randn(shape.outputs, shape.inputs) * shape.inputs**-0.5).to(shape.dtype).requires_grad_()
    bias = torch.randn(shape.outputs).to(shape.dtype).requires_grad_()
    implementations = {"naive": forward_backward(F.linear), "fused": forward_backward(linear)}
    compare(implementations, (x, weight, bias), bytes_moved=shape.bytes, flops=shape.flops)
