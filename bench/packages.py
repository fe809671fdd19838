"""Kernels of other packages as baselines of the rows they fit: flash-attn, xFormers, Liger. They run on a GPU alone.

Each function returns implementations by label, none where the package is not installed or the device is a CPU; what a
package raises is its refusal. Liger's cross_entropy is left out: it writes the gradient over its input, which the
others of a row need.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench import peers
from bench.peers import guarded


def attention(device: str, wrap: Callable, *, causal: bool) -> dict[str, Callable]:
    """Attention of q, k, v (B, H, L, D) without a mask, or causal with as many queries as keys; `wrap` may be
    forward_backward. Both packages want (B, L, H, D), and get it as a view.
    """
    found: dict[str, Callable] = {}
    if peers.runs("flash-attn", device):

        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from flash_attn import flash_attn_func

            return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)

        found["flash-attn"] = guarded(wrap(flash))
    if peers.runs("xformers", device):

        def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from xformers import ops

            if k.shape[1] != q.shape[1]:
                raise ValueError("its grouped queries want copies of the keys")
            mask = ops.LowerTriangularMask() if causal else None
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return ops.memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)

        found["xformers"] = guarded(wrap(efficient))
    return found


def add_layer_norm(device: str, wrap: Callable = lambda function: function) -> dict[str, Callable]:
    """layer_norm(x + residual): Liger has no kernel for both."""
    if not peers.runs("liger-kernel", device):
        return {}

    def liger(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(x + residual, weight, bias, 1e-5)

    return {"liger-kernel": guarded(wrap(liger))}


def linear_cross_entropy(device: str, wrap: Callable, *, label_smoothing: float) -> dict[str, Callable]:
    """Projection and loss of hidden (N, E), weight (V, E) and targets (N,)."""
    if not peers.runs("liger-kernel", device):
        return {}

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, targets, label_smoothing=label_smoothing)

    return {"liger-kernel": guarded(wrap(liger))}
