"""What a query may attend to: every mask form of the attention op, checked once and in one shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fused_transformer.kernels._checks import FLOATS, has_numbers, require, require_tensors

Causal = Literal[False, "top_left", "bottom_right"]


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of one attention call; all forms given combine by AND. See `attention` for their meaning.

    Sizes: `batch`, `q_length` and `k_length` are B, L and S; for packed batches L and S are the longest
    sequence's. `keep` and `bias` are 4-D with each axis 1 or full (packed: 1, or at least the longest).
    """

    batch: int
    q_length: int
    k_length: int
    keep: Tensor | None
    bias: Tensor | None
    causal: Causal
    window: tuple[int, int]  # (left, right); -1: no limit
    k_lengths: Tensor | None  # (B,) int64
    q_offsets: Tensor | None  # (B+1,) int64
    k_offsets: Tensor | None  # (B+1,) int64

    @property
    def packed(self) -> bool:
        return self.q_offsets is not None


@lru_cache(4096)
def _of_sizes(batch: int, q_length: int, k_length: int, causal: Causal) -> Mask:
    """The mask of calls without any but `causal`, made once for all of these sizes."""
    require(causal in (False, "top_left", "bottom_right"), _CAUSAL_HELP.format(causal))
    return Mask(batch, q_length, k_length, None, None, causal, (-1, -1), None, None, None)


def make_mask(
    q: Tensor,
    k: Tensor,
    *,
    keep: Tensor | None,
    bias: Tensor | None,
    causal: Causal,
    window: tuple[int, int] | None,
    k_lengths: Tensor | None,
    q_offsets: Tensor | None,
    k_offsets: Tensor | None,
) -> Mask:
    """Checks the mask arguments of `attention` against q and k; ValueError in the caller's words.

    Of tensors without numbers the shapes alone are checked, and the lengths of a packed batch are 0.
    """
    no_scores, no_lengths = keep is None and bias is None and window is None, k_lengths is None and q_offsets is None
    if no_scores and no_lengths and k_offsets is None and type(q) is Tensor:
        return _of_sizes(q.shape[0], q.shape[2], k.shape[2], causal)
    require(causal in (False, "top_left", "bottom_right"), _CAUSAL_HELP.format(causal))
    require_tensors(keep=keep, bias=bias, k_lengths=k_lengths, q_offsets=q_offsets, k_offsets=k_offsets)
    left, right = (-1, -1) if window is None else window
    require(left >= -1 and right >= -1, f"window must be (left, right), each >= 0 or -1 for no limit, got {window}")

    if q_offsets is None:
        require(k_offsets is None, "k_offsets needs q_offsets: either both are packed or neither")
        batch, q_length, k_length = q.shape[0], q.shape[2], k.shape[2]
    else:
        q_offsets = _offsets("q_offsets", q_offsets, q)
        k_offsets = q_offsets if k_offsets is None else _offsets("k_offsets", k_offsets, k)
        last = int(k_offsets[-1]) if has_numbers(k_offsets) else 0
        require(last <= k.shape[0], f"k_offsets ends at {last}, k has {k.shape[0]} tokens")
        same = q_offsets.shape == k_offsets.shape
        require(same, "q_offsets and k_offsets must have the same length B + 1")
        batch = q_offsets.shape[0] - 1
        q_length, k_length = _longest(q_offsets), _longest(k_offsets)

    if k_lengths is not None:
        require(
            tuple(k_lengths.shape) == (batch,), f"k_lengths must have shape ({batch},), got {tuple(k_lengths.shape)}"
        )
        require(k_lengths.device == k.device, f"k_lengths must be on {k.device}, got {k_lengths.device}")
        require(not k_lengths.is_floating_point(), f"k_lengths must be integers, got {k_lengths.dtype}")
        k_lengths = k_lengths.to(torch.int64).contiguous()
        # on a GPU this test would wait for the device
        if k_lengths.device.type == "cpu" and batch and has_numbers(k_lengths):
            low, high = int(k_lengths.min()), int(k_lengths.max())
            require(low >= 0 and high <= k_length, f"k_lengths must be between 0 and {k_length}, got {low} ... {high}")

    full = (batch, q.shape[-2 if q_offsets is not None else 1], q_length, k_length)
    if keep is not None:
        require(keep.dtype == torch.bool, f"keep must be bool (True = attend), got {keep.dtype}")
        keep = _broadcastable("keep", keep, full, q_offsets is not None, q.device)
    if bias is not None:
        require(bias.dtype in FLOATS, f"bias must be a float tensor, got {bias.dtype}")
        bias = _broadcastable("bias", bias, full, q_offsets is not None, q.device)
    return Mask(batch, q_length, k_length, keep, bias, causal, (left, right), k_lengths, q_offsets, k_offsets)


_CAUSAL_HELP = (
    'causal must be False, "top_left" (query i sees keys 0 ... i) or "bottom_right" (the last query sees the last '
    "key), got {!r}"
)


def _offsets(name: str, offsets: Tensor, x: Tensor) -> Tensor:
    require(offsets.dim() == 1 and offsets.shape[0] > 0, f"{name} must have shape (B + 1,), got {tuple(offsets.shape)}")
    require(offsets.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {offsets.dtype}")
    require(offsets.device == x.device, f"{name} must be on {x.device}, got {offsets.device}")
    if not has_numbers(offsets):
        return offsets
    require(int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all()), f"{name} must start at 0 and never decrease")
    require(int(offsets[-1]) <= x.shape[0], f"{name} ends at {int(offsets[-1])}, beyond the {x.shape[0]} packed tokens")
    return offsets.to(torch.int64).contiguous()


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if has_numbers(offsets) and len(offsets) > 1 else 0


def _broadcastable(name: str, x: Tensor, full: tuple[int, ...], packed: bool, device: torch.device) -> Tensor:
    require(x.device == device, f"{name} must be on {device}, got {x.device}")
    require(x.dim() <= 4, f"{name} must have at most 4 axes (B, H, L, S), got {x.dim()}")
    x = x.resolve_neg().reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    for axis, (have, want) in enumerate(zip(x.shape, full, strict=True)):
        # a packed batch's mask is indexed by position in the sequence, so it may be longer than the longest
        fits = have in (1, want) or (packed and axis >= 2 and have >= want)
        require(fits, f"{name} of shape {tuple(x.shape)} does not broadcast to (B, H, L, S) = {full}")
    return x
