"""Layer norm in C++ with SIMD and OpenMP, for CPU tensors; see csrc/layer_norm."""

from __future__ import annotations

from fused_transformer.kernels._native import library, refuses_tensors
from fused_transformer.kernels.layer_norm import native

_C = library()

# Rows whose contributions to dweight, dbias and dx_bias are summed one after another before the groups' sums are
# added up. Cut by the number of rows alone, so that the number of threads can't show in the result.
ROWS_PER_PART = 32
FEW_PARTS = 16


def refuses(x, *_args) -> str | None:
    return refuses_tensors("cpu", x=x)  # the other tensors were checked against x


def forward(*args):
    return native.forward(_C.layer_norm_forward, *args)


def backward(dy, dtotal, total, *args):
    count = total.numel() // total.shape[-1]
    rows_per_part = max(1, min(ROWS_PER_PART, count // FEW_PARTS))
    parts = max(1, -(-count // rows_per_part))
    return native.backward(_C.layer_norm_backward, parts, dy, dtotal, total, *args)
