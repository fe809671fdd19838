"""Attention in CUDA C++ on tensor cores (sm_80 and later), for tensors on a GPU; see csrc/attention/*.cu.

The forward pass exists twice: cuda_sm90.py says when Hopper's own is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _cuda
from fused_transformer.kernels._checks import empty_rows_like
from fused_transformer.kernels.attention import cuda_sm90, native
from fused_transformer.kernels.attention.mask import Mask

_C = _cuda.library()

# The gradient of a bias is summed by at least this many blocks a multiprocessor, so that one that broadcasts much does
# not leave the device to a few; each block that shares a sum costs a tile of float32 memory.
BIAS_BLOCKS_PER_MULTIPROCESSOR = 2
BIAS_TILE = 64  # queries and keys of a block (csrc/attention/backward_bias.cu)
# GPUs that give a block 99 KB of shared memory, where the others give it 163 or more; and the widest heads whose tiles
# fit into so little.
LITTLE_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
WIDEST_THERE = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


def refuses(q, k, v, mask: Mask, scale, dropout_p, seed) -> str | None:
    why = native.refuses_width(q) or _cuda.refuses_tensors(q=q, k=k, v=v, bias=mask.bias)
    return why or _refuses_width_there(q)


def _refuses_width_there(q: Tensor) -> str | None:
    major, minor = _cuda.capability(q.device)
    widest = WIDEST_THERE[q.dtype] if (major, minor) in LITTLE_SHARED_MEMORY else q.shape[-1]
    if q.shape[-1] <= widest:
        return None
    dtype = str(q.dtype).removeprefix("torch.")
    return (
        f"tiles of {q.shape[-1]} columns of {dtype} do not fit the shared memory of compute capability {major}.{minor}"
    )


def forward(q, k, v, mask: Mask, scale, dropout_p, seed):
    out, lse = empty_rows_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    if mask.packed or mask.k_length == 0:  # tokens of no sequence, and queries without keys
        out.zero_()
        lse.fill_(-torch.inf)
    if mask.k_length > 0:
        problem = native.problem(q, k, v, mask, scale, dropout_p, seed)
        into = native.rows(out), native.rows(lse[..., None])
        with _cuda.current(q):
            if cuda_sm90.why_not(q, problem) is None:
                launch = _cuda.on_current_stream(_C.attention_forward_sm90_cuda, q)
                launch(problem, (q.shape[0], k.shape[0]), *into)
            else:
                keep_bits = _keep_bits(q, mask)
                launch = _cuda.on_current_stream(_C.attention_forward_cuda, q)
                launch(problem, _device(q, keep_bits), *into)
    return out, lse


def backward(dout, q, k, v, out, lse, mask: Mask, scale, dropout_p, seed, wants_dbias):
    # The kernels write the rows of all sequences, but not packed tokens that belong to none.
    complete = mask.q_length > 0 and mask.k_length > 0 and not mask.packed
    dq, dk, dv = (empty_rows_like(x) if complete else empty_rows_like(x).zero_() for x in (q, k, v))
    dbias = _BiasGradient(q, mask) if wants_dbias else None
    if mask.k_length > 0:
        keep_bits, statistics = _keep_bits(q, mask), _statistics(q)
        problem = native.problem(q, k, v, mask, scale, dropout_p, seed)
        saved = (native.rows(out), native.rows(dout), native.rows(lse[..., None]))
        gradients = (native.rows(dq), native.rows(dk), native.rows(dv))
        into = (native.NO_SCORES, 1, 0, 0) if dbias is None else dbias.argument()
        with _cuda.current(q):
            launch = _cuda.on_current_stream(_C.attention_backward_cuda, q)
            launch(problem, _device(q, keep_bits), saved, gradients, native.rows(statistics), into)
    return dq, dk, dv, None if dbias is None else dbias.total


def weights(q, k, lse, mask: Mask, scale, dropout_p, seed):
    probabilities = q.new_empty((*q.shape[:3], mask.k_length))
    keep_bits = _keep_bits(q, mask)
    problem = native.problem(q, k, k, mask, scale, dropout_p, seed)
    with _cuda.current(q):
        launch = _cuda.on_current_stream(_C.attention_weights_cuda, q)
        launch(problem, _device(q, keep_bits), native.rows(lse[..., None]), probabilities.data_ptr())
    return probabilities


def _keep_bits(q: Tensor, mask: Mask) -> Tensor | None:
    """Memory for csrc/attention/keep_bits.cu: 64 keys a word, and once what `keep` broadcasts."""
    if mask.keep is None:
        return None
    full = (mask.batch, q.shape[1], mask.q_length, -(-mask.k_length // 64))
    _, *strides = native.scores(mask.keep)
    words = 1
    for size, stride in zip(full, strides, strict=True):
        words *= size if stride else 1
    return q.new_empty(words, dtype=torch.int64)


def _statistics(q: Tensor) -> Tensor:
    """Two floats for each query, those of a head side by side; in q's order of axes."""
    if q.dim() == 4:
        return q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    return q.new_empty((q.shape[1], q.shape[0], 2), dtype=torch.float32).transpose(0, 1)


def _device(q: Tensor, keep_bits: Tensor | None) -> tuple[int, int]:
    return 0 if keep_bits is None else keep_bits.data_ptr(), _cuda.multiprocessors(q.device)


class _BiasGradient:
    """The gradient of mask.bias, and the memory in which blocks sum parts of it."""

    def __init__(self, q: Tensor, mask: Mask):
        assert mask.bias is not None
        full = (mask.batch, q.shape[1], mask.q_length, mask.k_length)
        tiles = (mask.batch, q.shape[1], -(-mask.q_length // BIAS_TILE), -(-mask.k_length // BIAS_TILE))
        own = summed = 1
        for size, count in zip(mask.bias.shape, tiles, strict=True):
            own, summed = (own * count, summed) if size > 1 else (own, summed * count)
        wanted = BIAS_BLOCKS_PER_MULTIPROCESSOR * _cuda.multiprocessors(q.device)
        self.parts = max(1, min(summed, -(-wanted // max(own, 1))))
        # a packed batch's bias may be longer than its longest sequence, and no block owns what lies beyond
        covered = all(size in (1, count) for size, count in zip(mask.bias.shape, full, strict=True))
        written = covered and mask.q_length > 0 and mask.k_length > 0 and mask.batch > 0
        make = torch.empty if written else torch.zeros
        self.partial = make((self.parts, *mask.bias.shape), dtype=torch.float32, device=q.device)
        make = torch.empty_like if written else torch.zeros_like
        self.total = make(mask.bias, memory_format=torch.contiguous_format)

    def argument(self) -> tuple:
        return native.scores(self.partial[0]), self.parts, self.total.numel(), self.total.data_ptr()
