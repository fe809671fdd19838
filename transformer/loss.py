"""Cross entropy with label smoothing, per real token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_transformer.kernels.cross_entropy import cross_entropy, has_kernel
from fused_transformer.kernels.linear_cross_entropy import has_kernel as has_chunks
from fused_transformer.kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from fused_transformer.model import Transformer

CONVENTIONS = {"torch": "uniform", "tensor2tensor": "others"}  # and their names on the kernels' floor


def smoothed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.1,
    convention: str = "torch",
    padding_idx: int = 0,
) -> Tensor:
    """Mean over the real tokens of the cross entropy between a smoothed target and softmax(logits).

        loss = mean over i with targets[i] ≠ padding_idx of  -Σ_v q_i(v) · log softmax(logits_i)_v

        convention         q(target)          q(v), any other v
        "torch"            1 - ε + ε/V        ε/V                   torch.nn.functional.cross_entropy
        "tensor2tensor"    1 - ε              ε/(V - 1)             tensor2tensor, fairseq

    tensor2tensor also subtracts the entropy of q, a constant; it is not subtracted here.

    Args:
        logits: (..., V), float.
        targets: (...), int64.
        label_smoothing: ε, at least 0 and below 1.
        convention: "torch" or "tensor2tensor".
        padding_idx: targets that don't count; without any that count the loss is 0.

    Returns:
        () float32 (float64 for float64), with a gradient for logits.

    Raises:
        ValueError: the shapes do not fit, or an option is out of its range.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; Vaswani et al. 2017, section 5.4.
    """
    if logits.dim() < 1 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must be (..., V) and targets (...), got shapes {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    if has_kernel(logits):
        total = cross_entropy(
            logits,
            targets,
            label_smoothing=label_smoothing,
            smoothing=CONVENTIONS[convention],
            ignore_index=padding_idx,
            reduction="sum",
        )
    else:
        total = _torchs(logits, targets, label_smoothing, convention, padding_idx)
    return total / (targets != padding_idx).sum().clamp(min=1)


def projected_cross_entropy(
    model: Transformer, hidden: Tensor, targets: Tensor, *, label_smoothing: float = 0.1, padding_idx: int = 0
) -> Tensor:
    """smoothed_cross_entropy(model.project(hidden), targets), without holding the logits where a kernel spares them.

    That is on a CPU, in eager mode, where the projection is a linear layer that nobody hooked or replaced.
    """
    weights = model.output_weights()
    if weights is None or not has_chunks(hidden, weights[0]):
        logits = model.project(hidden)
        return smoothed_cross_entropy(logits, targets, label_smoothing=label_smoothing, padding_idx=padding_idx)
    total = linear_cross_entropy(
        *(hidden, *weights, targets), label_smoothing=label_smoothing, ignore_index=padding_idx, reduction="sum"
    )
    return total / (targets != padding_idx).sum().clamp(min=1)


def _torchs(logits: Tensor, targets: Tensor, label_smoothing: float, convention: str, padding_idx: int) -> Tensor:
    """The sum of the losses by torch's own function, where no kernel takes the logits; torch.compile fuses this."""
    vocabulary = logits.shape[-1]
    if convention == "tensor2tensor" and vocabulary > 1:
        # ε' of torch's convention with ε'/V = ε/(V - 1): then 1 - ε' + ε'/V = 1 - ε, the same distribution.
        label_smoothing *= vocabulary / (vocabulary - 1)
        if label_smoothing > 1.0:
            raise ValueError(f"label_smoothing leaves the target less than its share of {vocabulary} tokens")
    return F.cross_entropy(
        logits.reshape(-1, vocabulary).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.reshape(-1),
        ignore_index=padding_idx,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
