"""What torch.autocast makes of the ops: the dtypes that torch's own functions would give.

    attention, attention_weights      autocast's dtype, as scaled_dot_product_attention
    decode_attention                  the cache's: a cache is never copied
    layer norms                       on a GPU float32, on a CPU the dtype of x: as torch's norms on each
    embedding, bias_act               the dtype of the table and of x, as torch's
    cross_entropy                     float32, in autocast and out of it

float64 is left alone, as torch leaves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast computes with on x's device; None where it is off."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask about
        return None
    return torch.get_autocast_dtype(device)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a product, in autocast's dtype where it is on."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in tensors)


def lowers(x: Tensor) -> bool:
    """Whether `lowered` makes another tensor of x."""
    dtype = autocast_dtype(x)
    return dtype is not None and x.dtype not in (dtype, torch.float64)


def in_dtype_of(x: Tensor, given: Tensor) -> Tensor:
    """x in the dtype of `given`, if autocast is on: it may have made one in its dtype and the other not."""
    return x if x.dtype == given.dtype or autocast_dtype(x) is None else x.to(given.dtype)


def widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a norm, in float32 where autocast is on and torch's norms would be."""
    first = tensors[0]
    assert first is not None
    if first.device.type == "cpu" or autocast_dtype(first) is None:
        return tensors
    return tuple(x.float() if x is not None and x.dtype in SIXTEEN_BITS else x for x in tensors)
