"""Cross entropy in plain torch: the meaning every other backend is tested against.

Any device, any float dtype; arithmetic in float32 (float64 for float64 logits). It passes over the logits as often as
torch.nn.functional.cross_entropy does, so that it costs as much where there is no fused backend: log_softmax forward;
softmax, and the scaling of it, backward. It needs no statistic of the rows saved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refuses(*_args) -> None:
    return None


def forward(logits, targets, target_weight, every_weight, z_loss, ignore_index):
    log_probabilities = torch.log_softmax(logits, -1, dtype=_wide(logits))
    losses = torch.zeros_like(log_probabilities[:, 0])
    if target_weight:
        losses = losses - target_weight * log_probabilities.gather(1, _inside(targets, logits)[:, None])[:, 0]
    if every_weight:
        losses = losses - every_weight * log_probabilities.sum(-1)
    if z_loss:
        losses = losses + z_loss * _lse(logits).square()
    return _judged(losses, targets, logits, ignore_index), None, None


def backward(dlosses, logits, targets, _top, _log_sum, target_weight, every_weight, z_loss, ignore_index, inplace):
    scale = _judged(dlosses.to(_wide(logits)), targets, logits, ignore_index)[:, None]
    dlogits = torch.softmax(logits, -1, dtype=_wide(logits))
    if z_loss:
        dlogits.mul_(1.0 + 2.0 * z_loss * _lse(logits)[:, None])
    if every_weight:
        dlogits.sub_(every_weight)
    dlogits.mul_(scale)
    at_target = _inside(targets, logits)[:, None]
    dlogits.scatter_(1, at_target, dlogits.gather(1, at_target) - target_weight * scale)
    # rows of ignored targets may hold NaN, which 0 times is NaN
    dlogits.index_fill_(0, (targets == ignore_index).nonzero()[:, 0], 0.0)
    return logits.copy_(dlogits) if inplace else dlogits.to(logits.dtype)


def _judged(values: Tensor, targets: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """values, with 0 for ignored rows and NaN for those whose target is outside the vocabulary."""
    outside = (targets < 0) | (targets >= logits.shape[-1])
    return torch.where(targets == ignore_index, 0.0, torch.where(outside, torch.nan, values))


def _inside(targets: Tensor, logits: Tensor) -> Tensor:
    """targets that can be used as an index."""
    return targets.long().clamp(0, logits.shape[-1] - 1)


def _lse(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits.to(_wide(logits)), -1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
