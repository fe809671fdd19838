"""Connects torch with the direct calls of the compiled extension (csrc/common/bind_direct.h).

A direct call takes tensors and returns the op's result; None where it is not for it, and the op goes the long way as if
nothing had been tried; or True where a gradient is wanted, and the op's autograd.Function makes the call again, keeping
what the backward pass needs. It must not be reached while torch.compile traces.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from fused_transformer.kernels import _autocast, _dispatch, _native, memory

# In the order of Element in csrc/common/bind_direct.h.
_ELEMENTS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)


def _connected() -> str | None:
    """None, or why there are no direct calls."""
    if os.environ.get("FUSED_TRANSFORMER_DIRECT") == "0":
        return "FUSED_TRANSFORMER_DIRECT=0 turned them off"
    if not _native.available():
        return "the compiled extension is missing"
    if links()[0] is None:
        return "torch exports its tensors' memory from 2.10 on"
    connected = _native.library().connect(*links())
    with _disable_current_modes():  # of whoever imports this package where tensors are fake
        examples = [torch.empty(3, 5, dtype=dtype, device="cpu")[1:, 1:3].t() for dtype in _ELEMENTS]
        if not connected or not all(map(_is_seen, examples)):
            return "this torch describes its tensors in another way"
    return None


def links() -> tuple:
    """What the extension calls and looks at, in the order of `connect`; the last two are about the CUDA device."""
    return (
        getattr(Tensor, "__dlpack_c_exchange_api__", None),
        Tensor,
        torch.nn.Parameter,
        torch.device("cpu"),
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._is_any_autocast_enabled,
        torch.is_grad_enabled,
        _autocast.lowers,
        _dispatch._forced,
        vars(_dispatch),
        vars(forward_ad),
        torch.empty_like,
        lambda x, contiguous: memory.empty_result_like(x, contiguous=contiguous),
        lambda like, shape, dtype: memory.empty_result(*shape, like=like, dtype=dtype),
        torch.contiguous_format,
        torch.float32,
        torch.int64,
        getattr(torch._C, "_cuda_getCurrentRawStream", None),
        getattr(torch._C, "_cuda_getDevice", None),
    )


def _is_seen(x: Tensor) -> bool:
    """Whether the extension sees of x what torch says of it."""
    with torch.no_grad():
        seen = _native.library().direct_view(x)
    return seen == (x.data_ptr(), _ELEMENTS.index(x.dtype), tuple(x.shape), tuple(x.stride()))


def _never(*_args) -> None:
    return None


WHY_NONE = _connected()


def call(name: str) -> Callable[..., Any]:
    """The direct call of that name; one that is for nothing, where there are none."""
    return getattr(_native.library(), name) if WHY_NONE is None else _never
