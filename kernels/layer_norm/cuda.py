"""Layer norm in CUDA C++, for tensors on a GPU; see csrc/layer_norm."""

from __future__ import annotations

from fused_transformer.kernels import _cuda
from fused_transformer.kernels.layer_norm import native

_C = _cuda.library()

# The sums over rows are taken by at most this many blocks a multiprocessor: as many as run at once. Each costs N
# floats of traffic a sum, written and read again.
BLOCKS_PER_MULTIPROCESSOR = 2
# Up to this many columns a block takes eight rows at a time, one a warp (csrc/layer_norm/backward.cu).
WARP_COLUMNS, WARP_ROWS = 1024, 8


def refuses(x, *_args) -> str | None:
    return _cuda.refuses_tensors(x=x)  # the other tensors were checked against x


def forward(x, *args):
    with _cuda.current(x):
        return native.forward(_cuda.on_current_stream(_C.layer_norm_forward_cuda, x), x, *args)


def backward(dy, dtotal, total, *args):
    cols = total.shape[-1]
    rows_at_once = WARP_ROWS if cols <= WARP_COLUMNS else 1
    enough = -(-(total.numel() // cols) // rows_at_once)
    parts = max(1, min(enough, BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(total.device)))
    with _cuda.current(total):
        launch = _cuda.on_current_stream(_C.layer_norm_backward_cuda, total)
        return native.backward(launch, parts, dy, dtotal, total, *args)
