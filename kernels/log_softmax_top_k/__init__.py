"""The likeliest continuations of a beam search's hypotheses, out of their logits. For inference alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels import _direct
from fused_transformer.kernels._checks import require_no_gradient
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op
from fused_transformer.kernels.log_softmax_top_k import compiled
from fused_transformer.kernels.log_softmax_top_k.checks import checked

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))
_direct_call = _direct.call("log_softmax_top_k_direct")


def log_softmax_top_k(logits: Tensor, k: int, *, beams: int = 1, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best tokens of each sentence over all of its hypotheses, by their log-probabilities.

        value[r, v] = log_softmax(logits[r])_v + addend[r]                 r = sentence · beams + beam
        the k highest of a sentence's (beams, V) values, and where they are: beam · V + v

    No probability is written: a row is read once, for its log Σ exp and its k best, of which a sentence's are taken.

    Order: the higher value first. Of equal values the lower beam comes first, within a beam the higher logit (two may
    have one value after rounding), and of equal logits the lower v; so every backend decides alike. A logit of -inf, or
    an addend of -inf, is the value -inf: chosen last, in that order too. A beam whose logits are all -inf has such
    values alone. Where one of a sentence's logits is NaN or +inf, or an addend is, nothing can be chosen: all k values
    are NaN, and the places 0 ... k - 1.

    Args:
        logits: (R, V), the `beams` rows of a sentence side by side. float32, float16, bfloat16 or float64 (reference
            only); any strides (a last axis that is not contiguous is copied).
        k: from 1 to beams · V. The kernels take k and beams up to 64.
        beams: rows of a sentence; R is a multiple of it.
        addend: (R,) of any float dtype, the hypotheses' own log-probabilities, say. None: 0.

    Returns:
        values: (R / beams, k) float32 (float64 for float64), descending.
        places: (R / beams, k) int64.

    Raises:
        ValueError: shapes, dtypes, devices, k or beams do not fit, or a gradient is asked for; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32, (logit - maximum) - log Σ exp(logit - maximum) + addend; error at most twice that
        of plain torch. Which of two beams comes first can differ between backends where their values differ by less. A
        sentence's result does not depend on the others; the same bits on every run.
    """
    if not torch.compiler.is_compiling():
        both = _direct_call(logits, k, beams, addend)
        if both is not None:
            return both
    if routed(logits):
        return compiled.log_softmax_top_k(logits, k, beams, addend)
    require_no_gradient("log_softmax_top_k", logits=logits, addend=addend)
    arguments = checked(logits, k, beams, addend)
    return op.pick(*arguments).forward(*arguments)
