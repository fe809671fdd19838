"""linear_cross_entropy out of a linear layer and `cross_entropy`, with all the logits there at once: what the chunked
ones are tested against.

Any device, any float dtype. The losses are `cross_entropy`'s: on a GPU by its kernels, unless a backend is forced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fused_transformer.kernels.cross_entropy import op as cross_entropy
from fused_transformer.kernels.linear_cross_entropy.operands import operand


def refuses(*_args) -> None:
    return None


def forward(hidden, weight, bias, targets, dtype, *rest):
    logits = _logits(*(operand(x, dtype) for x in (hidden, weight, bias)))
    return cross_entropy.pick(logits, targets, *rest).forward(logits, targets, *rest)[0]


def backward(dlosses, hidden, weight, bias, targets, dtype, *rest_and_wanted):
    """The losses, and the gradients of hidden, weight and bias where wanted."""
    *rest, wanted = rest_and_wanted
    hidden, weight, bias = (operand(x, dtype) for x in (hidden, weight, bias))
    logits = _logits(hidden, weight, bias)
    losses_of = cross_entropy.pick(logits, targets, *rest)
    losses, *statistics = losses_of.forward(logits, targets, *rest)
    dlogits = losses_of.backward(dlosses, logits, targets, *statistics, *rest, True)
    dhidden = dlogits @ weight if wanted[0] else None
    dweight = dlogits.t() @ hidden if wanted[1] else None
    dbias = dlogits.sum(0, dtype=torch.promote_types(dtype, torch.float32)) if wanted[2] else None
    return losses, dhidden, dweight, dbias


def _logits(hidden, weight, bias):
    return F.linear(hidden, weight, bias)
