"""Connects torch with the direct calls of the compiled extension (csrc/common/bind_direct.h).

A direct call takes tensors and returns the op's result, or None where it is not for it: then nothing was done, and the
op goes the long way. It must not be reached while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels import _dispatch, _native


def _connected() -> str | None:
    """None, or why there are no direct calls."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if not _native.available():
        return "the compiled extension is missing"
    if table is None:
        return "torch exports its tensors' memory from 2.10 on"
    connected = _native.library().connect(
        table,
        Tensor,
        torch.nn.Parameter,
        torch.device("cpu"),
        torch._C._len_torch_dispatch_stack,
        torch._C._are_functorch_transforms_active,
        torch._C._get_tracing_state,
        torch._C._is_any_autocast_enabled,
        torch.is_grad_enabled,
        _dispatch._forced,
        vars(_dispatch),
        vars(forward_ad),
        torch.empty_like,
        torch.contiguous_format,
        torch.float32,
        torch.int64,
    )
    return None if connected else "this torch's table of tensors is of another version"


def _never(*_args) -> None:
    return None


WHY_NONE = _connected()


def call(name: str) -> Callable[..., Any]:
    """The direct call of that name; one that is for nothing, where there are none."""
    return getattr(_native.library(), name) if WHY_NONE is None else _never
