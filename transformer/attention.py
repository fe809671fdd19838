"""Multi-head attention: torch.nn.MultiheadAttention's constructor, forward and state_dict over the fused kernel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_transformer.kernels import attention, attention_weights, attention_with_lse, new_seed
from fused_transformer.kernels.attention import self_attention
from fused_transformer.masks import MultiheadAttentionError, attention_masks, check_inputs, check_masks
from fused_transformer.nested import forward_nested
from fused_transformer.plain import has_pre_hooks, no_op
from fused_transformer.products import applied, linear


def forbid_bypass(module: nn.MultiheadAttention) -> None:
    """Have torch.nn's layers call `module`: a submodule with a hook makes them, so it gets one that does nothing.

    In eval mode nn.TransformerEncoderLayer would read self_attn's weights instead and never call it.
    """
    if no_op not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(no_op)


def allow_bypass(module: nn.MultiheadAttention) -> None:
    """Undo `forbid_bypass`."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is no_op]:
        del module._forward_pre_hooks[key]


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention.

        head_h = softmax(q_h k_hᵀ / √D, masked) v_h     q_h = query W_hᵠ + b_hᵠ, likewise k_h from key, v_h from value
        out = concat(head_1 ... head_H) Wᴼ + bᴼ

    Constructor, parameters, their initial values and state_dict are torch.nn's, so weights go both ways. What differs:

    - A query with nothing to attend to gets out_proj.bias (its heads' outputs are 0) and weights of 0, with gradients
      0, in every mode; torch gives NaN in most. NaN in a masked key or value reaches nothing.
    - is_causal=True works without attn_mask. Given both, a query attends to what both allow.
    - need_weights=True stays on the fused path: the weights are computed after it, from its softmax statistics.
    - out_proj is called as a module, so hooks, pruning and adapters on it take effect.
    - train, eval and no_grad run the same kernel. torch's own fast path is never taken, not even inside
      nn.TransformerEncoderLayer, where it would pass this class by.
    - `key_lengths` beside torch's arguments: (B,) integers, the number of real keys of each sequence. On a GPU it is
      better than key_padding_mask, since the kernel need not read what lies beyond. (On a CPU the module finds out by
      itself that a mask is padding on the right.)

    Args: as torch.nn.MultiheadAttention.

    Raises:
        ValueError: embed_dim or num_heads below 1, shapes or masks that do not fit (then also an AssertionError and a
            RuntimeError, for callers who expect torch's).
        AssertionError: embed_dim not divisible by num_heads.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        forbid_bypass(self)

    def _call_impl(self, *args, **kwargs):
        """nn.Module's, but for the long way that it would go because of the hook of `forbid_bypass`."""
        others = self._forward_hooks or self._backward_hooks or self._backward_pre_hooks or _has_any_global_hook()
        if others or has_pre_hooks(self) or torch._C._get_tracing_state():
            return super()._call_impl(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_lengths: Tensor | None = None,
        q_offsets: Tensor | None = None,
        k_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from each query to the keys that no mask hides.

        Args:
            query: (N, L, E) if batch_first, else (L, N, E); unbatched (L, E) in both cases. Nested tensors, jagged or
                strided, if batch_first: then key and value are nested too, and no mask but is_causal goes with them.
            key, value: (N, S, kdim) and (N, S, vdim), or in query's order of axes.
            key_padding_mask: (N, S), unbatched (S). bool: True = ignore this key. float: added to its scores.
            need_weights: return the weights too.
            attn_mask: (L, S), (N·H, L, S) or (N or 1, H or 1, L, S). bool: True = ignore. float: added to the scores;
                has a gradient.
            average_attn_weights: the mean over the heads instead of each head's weights.
            is_causal: query i sees keys 0 ... i only.
            key_lengths: (N,) integers: keys at and beyond the length are ignored. Batched inputs only.
            q_offsets, k_offsets: (N + 1,) int32 or int64, for packed batches: query (T, E), key and value hold the
                sequences one after another, sequence n at q_offsets[n] ... q_offsets[n+1] - 1. k_offsets defaults to
                q_offsets. No masks but is_causal, and need_weights=False.

        Returns:
            out: query's shape.
            weights: (N, L, S), or (N, H, L, S) if not averaged, without N if unbatched; after dropout, as torch's. One
                key more each for add_bias_kv and add_zero_attn. None if not need_weights.
        """
        unmasked = key_padding_mask is attn_mask is key_lengths is q_offsets is k_offsets is None
        if unmasked and query is key is value and (projection := self._plain_projection(query)) is not None:
            heads, weights = self_attention(
                linear(query, *projection),
                self.num_heads,
                causal=is_causal,
                weights=("mean" if average_attn_weights else "each") if need_weights else None,
                batch_first=self.batch_first,
                dropout_p=self.dropout if self.training else 0.0,
            )
            return applied(self.out_proj, heads), weights
        if query.is_nested or key.is_nested or value.is_nested:
            return forward_nested(
                self,
                query,
                key,
                value,
                masked=key_padding_mask is not None or attn_mask is not None or key_lengths is not None,
                need_weights=need_weights,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if q_offsets is not None or k_offsets is not None:
            masked = key_padding_mask is not None or attn_mask is not None or key_lengths is not None
            return self._forward_packed(query, key, value, masked, need_weights, is_causal, q_offsets, k_offsets), None
        check_inputs(self, query, key, value)
        batched = query.dim() == 3
        q, k, v = self.project(query, key, value)
        masks: dict = {"causal": "top_left" if is_causal else False}
        added_keys = (self.bias_k is not None) + self.add_zero_attn
        if key_padding_mask is not None or attn_mask is not None or key_lengths is not None or added_keys:
            sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
            check_masks((sizes[0] if batched else None, *sizes[1:]), key_padding_mask, attn_mask, key_lengths)
            masks = attention_masks(
                *sizes,
                key_padding_mask=key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None],
                attn_mask=attn_mask,
                is_causal=is_causal,
                key_lengths=key_lengths,
                added_keys=added_keys,
                device=q.device,
            )
        if added_keys:
            k, v = self._with_added_keys(k, self.bias_k), self._with_added_keys(v, self.bias_v)
        if self.training and self.dropout > 0.0:
            masks |= {"dropout_p": self.dropout, "seed": new_seed(q.device)}  # weights and out get the same seed
        heads, lse = attention_with_lse(q, k, v, **masks)
        if not need_weights:
            return self.merge(heads, batched), None
        weights = attention_weights(q, k, lse, **masks)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        return self.merge(heads, batched), weights if batched else weights[0]

    def _plain_projection(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of one product that makes x's queries, keys and values, if its attention is no more."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None or self.bias_k is not None or self.add_zero_attn or x.is_nested:
            return None
        shape = x.shape
        if len(shape) != 3 or shape[2] != self.embed_dim or (bias is not None and bias.dtype != weight.dtype):
            return None
        return weight, bias

    # ------------------------------------------------------------ its parts, which cached decoding calls one by one

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' queries, keys and values: (N, H, L, D), (N, H, S, D) twice. Inputs as `forward` takes them."""
        if query is key and key is value and self._qkv_same_embed_dim:  # one product instead of three
            weight: Tensor = self.in_proj_weight
            bias: Tensor | None = self.in_proj_bias
            if bias is not None and bias.dtype != weight.dtype:
                bias = bias.to(weight.dtype)
            x = linear(query, weight, bias).view(*query.shape[:-1], 3, self.num_heads, self.head_dim)
            if x.dim() == 4:
                q, k, v = x[None].permute(2, 0, 3, 1, 4).unbind(0)
            else:
                q, k, v = x.permute(*((2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4))).unbind(0)
            return q, k, v
        return self.project_query(query), *self.project_keys(key, value)

    def project_query(self, query: Tensor) -> Tensor:
        """The heads' queries, (N, H, L, D)."""
        return self._split_heads(linear(query, *self._in_projection("q", 0, 1)))

    def project_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' keys and values, (N, H, S, D) each."""
        if key is value and self._qkv_same_embed_dim:
            k, v = linear(key, *self._in_projection("kv", 1, 2)).chunk(2, dim=-1)
        else:
            k = linear(key, *self._in_projection("k", 1, 1))
            v = linear(value, *self._in_projection("v", 2, 1))
        return self._split_heads(k), self._split_heads(v)

    def merge(self, heads: Tensor, batched: bool = True) -> Tensor:
        """(N, H, L, D) to what `forward` returns: the heads side by side, through out_proj."""
        if not batched:
            return applied(self.out_proj, heads[0].transpose(0, 1).flatten(1))
        heads = heads.transpose(1, 2) if self.batch_first else heads.permute(2, 0, 1, 3)
        return applied(self.out_proj, heads.flatten(2))

    def _in_projection(self, name: str, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of q, k, v or kv: `count` of the three matrices from the `first` on."""
        start, rows, bias = first * self.embed_dim, count * self.embed_dim, self.in_proj_bias
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight.narrow(0, start, rows)
        else:
            weight = getattr(self, f"{name}_proj_weight")
        return weight, None if bias is None else bias.narrow(0, start, rows).to(weight.dtype)

    def _split_heads(self, x: Tensor) -> Tensor:
        """`forward`'s axes to (N, H, L, D), without a copy."""
        shape = x.shape
        if len(shape) == 2:
            return x.view(shape[0], self.num_heads, self.head_dim).transpose(0, 1)[None]
        x = x.view(shape[0], shape[1], self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _with_added_keys(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Keys or values (N, H, S, D) with bias_k or bias_v and a zero appended, where the constructor asked for it."""
        extra = []
        if learned is not None:
            extra.append(learned.to(x.dtype).view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            extra.append(x.new_zeros(*x.shape[:2], 1, self.head_dim))
        return torch.cat([x, *extra], dim=2) if extra else x

    def _forward_packed(self, query, key, value, masked, need_weights, is_causal, q_offsets, k_offsets):
        if masked or need_weights or self.bias_k is not None or self.add_zero_attn or q_offsets is None:
            raise MultiheadAttentionError(
                "packed batches need q_offsets and need_weights=False, and go with neither masks (but is_causal), "
                "key_lengths, add_bias_kv nor add_zero_attn"
            )
        if not query.dim() == key.dim() == value.dim() == 2:
            raise MultiheadAttentionError(
                f"packed query, key and value must be (T, E), got {query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
            )
        check_inputs(self, query, key, value)
        q, k, v = (x[0].transpose(0, 1) for x in self.project(query, key, value))  # (T, H, D)
        causal: Literal["top_left", False] = "top_left" if is_causal else False
        dropout_p = self.dropout if self.training else 0.0
        heads = attention(q, k, v, q_offsets=q_offsets, k_offsets=k_offsets, causal=causal, dropout_p=dropout_p)
        return applied(self.out_proj, heads.flatten(1))
