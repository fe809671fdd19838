"""Bias, activation and dropout in one pass: what stands between the two matrices of a feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels import _direct, _node
from fused_transformer.kernels._autograd import applied_directly, once_differentiable
from fused_transformer.kernels._checks import require_dropout
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op, forced_backend
from fused_transformer.kernels._native import DTYPES, available
from fused_transformer.kernels._philox import seed_for
from fused_transformer.kernels.bias_act import compiled
from fused_transformer.kernels.bias_act.checks import ACTIVATIONS, check
from fused_transformer.kernels.memory import LARGE_BYTES

__all__ = ["ACTIVATIONS", "bias_act", "has_kernel", "op"]

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))
_direct_call = _direct.call("bias_act_direct")
_direct_backward = _direct.call("bias_act_backward_direct")


class _BiasAct(torch.autograd.Function):
    """Shared by all backends. ReLU's derivative is read off its output, which the next matrix keeps anyway: it is
    positive where x + bias is and the mask keeps it. For GELU x is kept, and x + bias and the mask are computed again.
    """

    @staticmethod
    def forward(ctx, x, bias, seed, activation, dropout_p):
        arguments = (x, bias, seed, activation, dropout_p)
        backend, y = None, _direct_call(*arguments, True)
        if y is None:
            backend = op.pick(*arguments)
            y = backend.forward(*arguments)
        ctx.save_for_backward(*((y, None, None) if activation == "relu" else (x, bias, seed)))
        ctx.backend, ctx.activation, ctx.dropout_p = backend, activation, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, bias, seed = ctx.saved_tensors
        arguments, wanted = (dy, saved, bias, seed, ctx.activation, ctx.dropout_p), ctx.needs_input_grad[:2]
        gradients = _direct_backward(*arguments, wanted) if ctx.backend is None else None
        if gradients is None:
            backend = op.on(saved) if ctx.backend is None else ctx.backend
            gradients = backend.backward(*arguments, *wanted)
        dx, dbias = gradients
        return dx, None if dbias is None else dbias.to(ctx.bias_dtype), None, None, None


_apply_directly = applied_directly(_BiasAct)


def _context(_saved: tuple, constants: tuple) -> dict:
    activation, dropout_p, bias_dtype = constants
    return {"backend": None, "activation": activation, "dropout_p": dropout_p, "bias_dtype": bias_dtype}


_PLAN = _node.Plan(
    "FusedBiasActBackward",
    _BiasAct,
    _context,
    backward="bias_act_backward_direct",
    sources="g0 s0 s1 s2 c0 c1 n",
    inputs=(0, 1),
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The step between the two matrices of a feed-forward network, in one pass over memory.

        y = dropout(activation(x + bias))

        "relu"         max(h, 0)
        "gelu"         h · Φ(h) = h/2 · (1 + erf(h/√2))
        "gelu_tanh"    h/2 · (1 + tanh(√(2/π) · (h + 0.044715 h³)))         the approximation of BERT's and GPT-2's code

    Args:
        x: (..., F), F >= 1. float32, float16, bfloat16 or float64 (reference only); any strides.
        bias: (F,), the dtype of x or float32; None: 0.
        activation: "relu", "gelu" or "gelu_tanh".
        dropout_p: probability of zeroing an element of the result; the others are scaled by 1 / (1 - p).
        seed: (1,) int64 on x's device; the mask is a function of it alone. Default: drawn from torch's generator.

    Returns:
        (..., F), contiguous, the dtype and device of x.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes, devices or options do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: arithmetic in float32, rounded once; error at most twice that of plain torch in the same dtype. At 0 the
        derivative of ReLU is 0, as torch's.
    Backward: dx, dbias; the mask is drawn again, not stored; the same bits on every run. Once differentiable.
    Source: Vaswani et al. 2017, eq. 2; Hendrycks and Gimpel 2016, arXiv:1606.08415, eq. 1-2.
    """
    if not torch.compiler.is_compiling():
        y = _directly(x, bias, seed, activation, dropout_p)
        if y is not None:
            return y
    if routed(x):
        return compiled.bias_act(x, bias, seed, activation, float(dropout_p))
    check(x, bias, activation)
    require_dropout(dropout_p, seed, x.device)
    seed = seed_for(x, dropout_p, seed)
    arguments = (x, bias, seed, activation, float(dropout_p))
    wants_backward = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_backward or forward_ad._current_level >= 0:  # forward-mode AD: autograd must see the call to refuse it
        return _BiasAct.apply(*arguments)
    return op.pick(*arguments).forward(*arguments)


def _directly(x, bias, seed, activation, dropout_p):
    """The result of a direct call; None where it is not for one."""
    keep = _node.KEEP
    y = _direct_call(x, bias, seed, activation, dropout_p, keep)
    lacking = y is True  # the seed, if no node is made by Python
    if lacking:
        seed = seed_for(x, dropout_p, seed)
        y = None if keep is False else _direct_call(x, bias, seed, activation, dropout_p, keep)
    if type(y) is list:
        (y,) = y
        saved = (y, None, None) if activation == "relu" else (x, bias, seed)
        bias_dtype = None if bias is None else bias.dtype
        _PLAN.attach((y,), (x, bias), saved, (activation, dropout_p, bias_dtype))
    elif lacking:
        y = _apply_directly(x, bias, seed, activation, dropout_p)
    return y


def has_kernel(x: Tensor, activation: str, dropout_p: float = 0.0) -> bool:
    """Whether a kernel takes x here and is the better choice beside torch's own activation and dropout.

    It is not on a CPU for ReLU or the exact GELU of less than 4 MB alone, since one pass of torch's is as quick as one
    of ours, whose results lie in memory that is used again from there on (see `memory.py`); nor inside torch.compile,
    which fuses them itself, but for dropout on a CPU, whose bits are to be those of an eager call. The backend that
    `use_backend` forces is taken at its word.
    """
    if torch.compiler.is_compiling():
        return x.is_cpu and dropout_p > 0.0 and x.dtype in DTYPES and available()
    small = x.numel() * x.itemsize < LARGE_BYTES
    if x.is_cpu and small and dropout_p == 0.0 and activation != "gelu_tanh" and forced_backend() is None:
        return False
    return op.serves(x, None, None, activation, dropout_p)
