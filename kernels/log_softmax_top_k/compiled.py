"""log_softmax_top_k as an operator of torch; see kernels/_compile.py."""

from __future__ import annotations

import torch

from fused_transformer.kernels._checks import require_no_gradient
from fused_transformer.kernels._compile import operator
from fused_transformer.kernels._dispatch import OPS
from fused_transformer.kernels.log_softmax_top_k import reference
from fused_transformer.kernels.log_softmax_top_k.checks import checked, values_dtype


def log_softmax_top_k(logits, k, beams, addend):
    """The public function as one node."""
    require_no_gradient("log_softmax_top_k", logits=logits, addend=addend)
    return _log_softmax_top_k(logits, k, beams, addend)


def _forward(*arguments):
    arguments = checked(*arguments)
    return OPS["log_softmax_top_k"].pick(*arguments).forward(*arguments)


def _forward_fake(*arguments):
    logits, _, beams, k = checked(*arguments)
    shape = (logits.shape[0] // beams, k)
    return logits.new_empty(shape, dtype=values_dtype(logits)), logits.new_empty(shape, dtype=torch.int64)


_log_softmax_top_k = operator(
    "log_softmax_top_k(Tensor logits, int k, int beams, Tensor? addend) -> (Tensor values, Tensor places)",
    run=_forward,
    fake=_forward_fake,
    plain=lambda *arguments: reference.forward(*checked(*arguments)),
)
