"""Masked softmax attention: softmax(scale · q kᵀ + bias, masked) v, with every mask form PyTorch users have."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_transformer.kernels._autocast import lowered
from fused_transformer.kernels._autograd import once_differentiable
from fused_transformer.kernels._checks import require_dropout
from fused_transformer.kernels._compile import routed
from fused_transformer.kernels._dispatch import Op, undisturbed
from fused_transformer.kernels._philox import new_seed, seed_for
from fused_transformer.kernels.attention import compiled, together
from fused_transformer.kernels.attention.checks import check_statistics, check_tensors
from fused_transformer.kernels.attention.differentiated import Others, _Attention, directly, to_save
from fused_transformer.kernels.attention.mask import Causal, Mask, make_mask

op = Op(__name__, order=("cuda", "triton", "cpu", "reference"))


class _Weights(torch.autograd.Function):
    """The probabilities themselves. Differentiable, because losses on attention exist."""

    @staticmethod
    def forward(ctx, q, k, bias, lse, mask: Mask, scale: float, dropout_p: float, seed):
        backend = op.pick(q, k, k, mask, scale, dropout_p, seed)
        weights = backend.weights(q, k, lse, mask, scale, dropout_p, seed)
        # the last two only so that a change in place is noticed
        ctx.save_for_backward(q, k, bias, lse, seed, to_save(mask.keep), to_save(mask.k_lengths))
        ctx.mask, ctx.scale, ctx.dropout_p = mask, scale, dropout_p
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights):
        # The caller already holds (B, H, L, S) numbers, so nothing is lost by plain torch here.
        from fused_transformer.kernels.attention import reference

        q, k, bias, lse, seed, *_ = ctx.saved_tensors
        dq, dk, dbias = reference.weights_backward(
            dweights, q, k, lse, ctx.mask, ctx.scale, ctx.dropout_p, seed, bias is not None and ctx.needs_input_grad[2]
        )
        return dq, dk, dbias, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    k_lengths: Tensor | None = None,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Masked scaled dot-product attention of each head.

        out = dropout(softmax(scale · q kᵀ + bias, over the keys that are not masked)) v

    Args:
        q: (B, H, L, D), or packed (T, H, D) with q_offsets. float32, float16, bfloat16 or float64 (reference only);
            any strides. The fused backends take D from 1 to 256.
        k, v: (B, H_k, S, D), or packed (T_k, H_k, D); H a multiple of H_k: query head h reads key head
            h // (H / H_k) (grouped-query attention).
        keep: bool, True = attend, broadcastable to (B, H, L, S) without being materialised. Note that
            nn.MultiheadAttention's masks mean the opposite.
        bias: float, broadcastable to (B, H, L, S), added to the scaled scores; -inf masks. Has a gradient.
        causal: False; "top_left": query i sees keys j <= i (as in scaled_dot_product_attention); "bottom_right":
            j <= i + n - L for the row's n keys, so that the last query sees the last key (as in decoding).
        window: (left, right): key j is seen only if -left <= j - i <= right, with i shifted as `causal` does; -1: no
            limit.
        k_lengths: (B,) integers, 0 ... S: keys at and beyond the length are masked, and never read.
        q_offsets, k_offsets: (B + 1,) int32 or int64 for packed batches: sequence b is q[q_offsets[b]:q_offsets[b+1]].
            k_offsets defaults to q_offsets. Padded and packed results agree bit for bit.
        scale: default 1 / √D.
        dropout_p: probability of zeroing a weight; the others are scaled by 1 / (1 - p).
        seed: (1,) int64 on q's device; the mask is a function of it alone. Default: drawn from torch's generator.

    Returns:
        q's shape, dtype and device. A query with nothing to attend to gives 0, with gradients 0. Under torch.autocast
        q, k and v are taken in its dtype, as scaled_dot_product_attention takes them; the bias is as it is.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the sentence says which.
        NotImplementedError: a backend was forced that refuses these arguments.

    Numerics: scores, softmax and sums in float32; error at most twice that of plain torch in the same dtype.
        NaN or Inf in a masked key or value never reaches the output or a gradient. Deterministic: the same bits
        on every run, whatever else is in the batch.
    Source: Vaswani et al. 2017, eq. 1; online softmax after Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if not torch.compiler.is_compiling():
        arguments = (q, k, v, keep, bias, causal, window, k_lengths, q_offsets, k_offsets, scale, dropout_p, seed)
        out = directly(*arguments, False)
        if out is not None:
            return out
    return attention_with_lse(
        q,
        k,
        v,
        keep=keep,
        bias=bias,
        causal=causal,
        window=window,
        k_lengths=k_lengths,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    k_lengths: Tensor | None = None,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each row's softmax denominator.

        lse = log Σ_j exp(scale · q kⱼ + biasⱼ)        over the keys that are not masked; -inf if there are none

    Returns:
        out: as `attention`.
        lse: float32 (float64 for float64 inputs), q's shape without the last axis; not differentiable.
            `attention_weights` takes it.
    """
    masks = (keep, bias, causal, window, k_lengths, q_offsets, k_offsets)
    if not torch.compiler.is_compiling():
        both = directly(q, k, v, *masks, scale, dropout_p, seed, True)
        if both is not None:
            return both
    if routed(q):
        return compiled.attention(q, k, v, *masks, scale, dropout_p, seed)
    if torch._C._is_any_autocast_enabled():
        q, k, v = lowered(q, k, v)
    q, k, v = check_tensors(q, k, v, packed=q_offsets is not None)
    mask = make_mask(
        q,
        k,
        keep=keep,
        bias=bias,
        causal=causal,
        window=window,
        k_lengths=k_lengths,
        q_offsets=q_offsets,
        k_offsets=k_offsets,
    )
    require_dropout(dropout_p, seed, q.device)
    seed = seed_for(q, dropout_p, seed)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    if _differentiated(q, k, v, mask.bias):
        others = Others(causal, window, k_lengths, q_offsets, k_offsets)
        return _Attention.apply(q, k, v, keep, bias, seed, others, mask, scale, float(dropout_p))
    arguments = (q, k, v, mask, scale, float(dropout_p), seed)
    return op.pick(*arguments).forward(*arguments)  # a short call's time is half apply()


def self_attention(
    qkv: Tensor,
    heads: int,
    *,
    causal: bool = False,
    weights: together.Weights = None,
    batch_first: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`attention` of sequences over themselves, from the one product that makes queries, keys and values of them.

        q, k, v = the thirds of qkv's last axis, each cut into the heads
        out     = the heads' attention(q, k, v), side by side again

    Args:
        qkv: (B, L, 3·H·D), or (L, B, 3·H·D) if not batch_first. Dtypes as `attention` takes them.
        heads: H.
        causal: query i sees keys 0 ... i.
        weights: "each": return what `attention_weights` gives too; "mean": its mean over the heads.
        batch_first: which of qkv's axes is the batch.
        dropout_p, seed: as `attention` takes them.

    Returns:
        out: qkv's shape with a third of its last axis.
        weights: (B, H, L, L) of each head, (B, L, L) on average, or None.
        Bit for bit, out and each head's weights are what `attention` and `attention_weights` give.

    Raises:
        ValueError: qkv is not 3-D, or 3·H does not divide its last axis; or as `attention`.

    Numerics: `attention`'s. In inference on a CPU it is one call of compiled code: L = 1 takes a third of the time.
    Source: Vaswani et al. 2017, section 3.2.2.
    """
    if weights not in (None, "each", "mean"):
        raise ValueError(f'weights must be "each", "mean" or None, got {weights!r}')
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv must be (B, L, 3 * {heads} * D), got {tuple(qkv.shape)}")
    if not routed(qkv):
        if dropout_p != 0.0:
            require_dropout(dropout_p, seed, qkv.device)
            seed = seed_for(qkv, dropout_p, seed)  # out and weights get the same
        differentiated = _differentiated(qkv)
        if undisturbed() and together.takes(qkv, heads, differentiated):
            options = (heads, bool(causal), weights, batch_first, dropout_p, seed)
            if differentiated:
                return together.SelfAttention.apply(qkv, *options)
            return together.forward(qkv, *options)
    q, k, v = together.thirds(qkv, heads, batch_first)
    if dropout_p > 0.0 and seed is None:
        seed = new_seed(qkv.device)
    masks: dict = {"causal": "top_left" if causal else False, "dropout_p": dropout_p, "seed": seed}
    out, lse = attention_with_lse(q, k, v, **masks)
    out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
    if weights is None:
        return out, None
    each = attention_weights(q, k, lse, **masks)
    return out, each if weights == "each" else each.mean(dim=1)


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: tuple[int, int] | None = None,
    k_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The attention probabilities that `attention` used and did not keep.

        weights = dropout(exp(scale · q kᵀ + bias - lse))        0 where masked

    Args:
        q, k, keep, bias, causal, window, k_lengths, scale, dropout_p, seed: as given to `attention_with_lse`
            (padded batches only).
        lse: (B, H, L), as `attention_with_lse` returned it.

    Returns:
        (B, H, L, S) in q's dtype; differentiable in q, k and bias. Each row sums to 1 (before dropout), or is 0
        where the row has nothing to attend to.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or dropout_p > 0 without the seed of the forward call.
    """
    if routed(q):
        masks = (keep, bias, causal, window, k_lengths)
        return compiled.attention_weights(q, k, lse, *masks, scale, dropout_p, seed)
    if torch._C._is_any_autocast_enabled():
        q, k = lowered(q, k)
    q, k, _ = check_tensors(q, k, k, packed=False)
    mask = make_mask(
        q,
        k,
        keep=keep,
        bias=bias,
        causal=causal,
        window=window,
        k_lengths=k_lengths,
        q_offsets=None,
        k_offsets=None,
    )
    require_dropout(dropout_p, seed, q.device)
    check_statistics(q, lse, dropout_p, seed)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    if _differentiated(q, k, mask.bias):
        return _Weights.apply(q, k, mask.bias, lse.contiguous(), mask, scale, float(dropout_p), seed)
    arguments = (mask, scale, float(dropout_p), seed)
    return op.pick(q, k, k, *arguments).weights(q, k, lse.contiguous(), *arguments)


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the call; also in forward mode, which it then refuses."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
