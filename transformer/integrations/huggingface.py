"""Hugging Face transformers: `attn_implementation="fused_transformer"` for every model that takes one.

from fused_transformer.integrations import huggingface

huggingface.register()
model = AutoModel.from_pretrained(..., attn_implementation="fused_transformer")
model.set_attn_implementation("fused_transformer")          # or of a model that there is already
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.kernels import attention, attention_weights, attention_with_lse, new_seed

NAME = "fused_transformer"

# Options of attention functions that change the result, each with what it is. A model passes them to those alone that
# it believes to heed them, so ignoring one would be wrong.
UNSUPPORTED = {
    "softcap": "softcap, scores that go through tanh",
    "block_table": "a paged cache",
    "indices": "sparse attention to the keys of an indexer",
    "block_indices": "sparse attention to the blocks of an indexer",
    "sinks": "attention sinks of each token",
}

_collector: Any = None  # transformers' own record of what a running model was asked to return; found by `register`


def register() -> None:
    """Make `attn_implementation="fused_transformer"` known to transformers. Calling it again changes nothing.

    Both halves are registered: `attention_forward`, and the function that makes its masks. (Without the latter
    transformers would pass no mask at all, not even for padding.)

    Raises:
        ImportError: transformers is not installed, or has no such interface yet.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
        from transformers.utils import output_capturing
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'fused-transformer[huggingface]'") from error
    global _collector
    _collector = getattr(output_capturing, "_active_collector", None)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # bool (B, 1, L, S), True = attend; None where causal says it all


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it, in place of `eager_attention_forward` or `sdpa_attention_forward`.

        out = dropout(softmax(scaling · q kᵀ + position_bias + attention_mask, masked)) v

    Args:
        module: the attention module that calls; its `is_causal` counts where the argument is None (True if absent).
        query: (B, H, L, D).
        key, value: (B, H_k, S, D), H a multiple of H_k: heads of keys are not repeated. Values may be narrower.
        attention_mask: None, or 4-D and broadcastable to (B, H, L, S). bool: True = attend. float: added to the scores.
        dropout: probability of zeroing a weight; 0 outside of training.
        scaling: default 1 / √D.
        is_causal: counts where there is no mask and L > 1: query i sees keys 0 ... i.
        position_bias: float, broadcastable to (B, H, L, S), added to the scaled scores (T5's). Has a gradient.
        options: what else models pass. `output_attentions`: return the weights. `s_aux`: (H,) attention sinks, a score
            for each head that joins the softmax's denominator and no output; without gradients. Where there is no
            mask, `cu_seq_lens_q` and `cu_seq_lens_k`: the offsets of a packed batch's sequences (B = 1), causal for
            the last query to see the last key and with `sliding_window`, as in flash attention. A mask says all of
            that itself.

    Returns:
        out: (B, L, H, D), contiguous.
        weights: (B, H, L, S), after dropout, where the model was asked for them, else None. They are computed from
            the fused kernel's statistics: nothing falls back to another attention.

    Raises:
        NotImplementedError: an option of `UNSUPPORTED`, `s_aux` in training, or, for a packed batch without a mask,
            the weights, `s_aux` or `position_bias`.
        ValueError: a mask of another form, or shapes that do not fit.
    """
    for name, what in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise _unsupported(what)
    sinks = options.get("s_aux")
    if sinks is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, sinks)):
        raise _unsupported("attention sinks (s_aux) with gradients; under torch.no_grad() it takes them")

    if value.shape[-1] < key.shape[-1]:  # DeepSeek's; the op wants one width
        padded = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
        out, weights = attention_forward(
            module, query, key, padded, attention_mask, dropout, scaling, is_causal, position_bias, **options
        )
        return out[..., : value.shape[-1]].contiguous(), weights

    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    wants_weights = _wants_weights(module, options)
    if attention_mask is None and options.get("cu_seq_lens_q") is not None:
        if wants_weights or sinks is not None or position_bias is not None:
            raise _unsupported("weights, sinks and position biases of packed batches, unless there is a mask")
        return _packed(query, key, value, causal, dropout, scaling, options), None

    if query.shape[0] != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, the same for the whole batch
    masks = _masks(attention_mask, position_bias)
    if query.shape[2] > 1 and attention_mask is None and causal:
        masks["causal"] = "top_left"
    if dropout > 0.0:
        masks |= {"dropout_p": dropout, "seed": new_seed(query.device)}  # out and weights by the same seed

    out, lse = attention_with_lse(query, key, value, scale=scaling, **masks)
    # The share of the denominator that the keys have beside the sink.
    share = None if sinks is None else torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
    weights = None
    if wants_weights:
        weights = attention_weights(query, key, lse, scale=scaling, **masks)
        weights = weights if share is None else weights * share
    out = out if share is None else out * share
    return out.transpose(1, 2).contiguous(), weights


def _packed(query, key, value, causal: bool, dropout: float, scaling: float | None, options: dict[str, Any]) -> Tensor:
    """(1, T, H, D) of sequences one after another, each attending to its own keys."""
    left = options.get("sliding_window")
    out = attention(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        q_offsets=options["cu_seq_lens_q"],
        k_offsets=options.get("cu_seq_lens_k"),
        causal="bottom_right" if causal else False,
        window=None if left is None else (left - 1, -1 if causal else left - 1),
        scale=scaling,
        dropout_p=dropout,
    )
    return out[None]


def _masks(attention_mask: Tensor | None, position_bias: Tensor | None) -> dict[str, Any]:
    """The attention op's keep and bias."""
    if attention_mask is None:
        return {"bias": position_bias}
    if attention_mask.dim() != 4 or not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise ValueError(
            f'attn_implementation="{NAME}" takes masks that are bool (True = attend) or float and broadcast to '
            f"(B, H, L, S), got {attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype == torch.bool:
        return {"keep": attention_mask, "bias": position_bias}
    return {"bias": attention_mask if position_bias is None else attention_mask + position_bias}


def _wants_weights(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether somebody asked the model for attentions: in the call, or in its configuration.

    Not every model hands `output_attentions` down to here (GPT-2 does not), so transformers' record is asked as well.
    """
    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    if _collector is None:
        return False
    collected = _collector.global_var if torch.compiler.is_compiling() else _collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'attn_implementation="{NAME}" does not support {what}. Set the model\'s attn_implementation to "eager"'
    )
