"""torch.nn's masks (True = ignore), checked and turned into the attention op's (True = attend): here alone.

The checks complain in torch.nn's words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttentionError(ValueError, AssertionError, RuntimeError):
    """Shapes or masks do not fit. Callers of torch.nn.MultiheadAttention expect one of the latter two."""


def check_inputs(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """An error unless query, key and value fit the module and each other."""
    q, k, v = query.shape, key.shape, value.shape
    batch_axis = 0 if module.batch_first else 1
    if not (
        len(q) in (2, 3)
        and len(k) == len(v) == len(q)
        and q[-1] == module.embed_dim
        and k[-1] == module.kdim
        and v[-1] == module.vdim
        and k[:-1] == v[:-1]
        and (len(q) == 2 or q[batch_axis] == k[batch_axis])
    ):
        _complain(module, query, key, value, batch_axis)


def check_axes(query: Tensor) -> None:
    """An error unless the query is 2-D or 3-D."""
    if query.dim() not in (2, 3):
        raise MultiheadAttentionError(
            f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
        )


def _complain(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, batch_axis: int) -> None:
    check_axes(query)
    if key.dim() != query.dim() or value.dim() != query.dim():
        which = "For batched (3-D) `query`" if query.dim() == 3 else "For unbatched (2-D) `query`"
        raise MultiheadAttentionError(
            f"{which}, expected `key` and `value` to be {query.dim()}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    widths = (("query", query, module.embed_dim), ("key", key, module.kdim), ("value", value, module.vdim))
    for name, x, width in widths:
        if x.shape[-1] != width:
            raise MultiheadAttentionError(
                f"{name}: was expecting embedding dimension of {width}, but got {x.shape[-1]}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise MultiheadAttentionError(
            f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            f" (key shape {key.shape} does not match value shape {value.shape})"
        )
    raise MultiheadAttentionError(
        f"query and key must have the same batch size, got {query.shape[batch_axis]} and {key.shape[batch_axis]}"
        f" (batch_first={module.batch_first})"
    )


def check_masks(
    sizes: tuple[int | None, int, int, int],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    """An error in torch.nn's words unless the masks fit sizes = (B, H, L, S); B is None for unbatched inputs."""
    batch, heads, length, keys = sizes
    which = "For unbatched (2-D) `query`" if batch is None else "For batched (3-D) `query`"
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise MultiheadAttentionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if key_padding_mask is not None:
        axes = 2 if batch is not None else 1
        if key_padding_mask.dim() != axes:
            raise MultiheadAttentionError(
                f"{which}, expected `key_padding_mask` to be `None` or {axes}-D"
                f" but found {key_padding_mask.dim()}-D tensor instead"
            )
        if key_padding_mask.shape[-1] != keys or (axes == 2 and key_padding_mask.shape[0] != batch):
            raise MultiheadAttentionError(
                f"Expected key_padded_mask.shape[{axes - 1}] to be {keys}, but got {key_padding_mask.shape[-1]}"
                f" (key_padding_mask has shape {tuple(key_padding_mask.shape)})"
            )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3, 4):
            raise MultiheadAttentionError(
                f"{which}, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
            )
        rows = 1 if batch is None else batch
        expected: tuple[int, ...] = (length, keys)
        if attn_mask.dim() == 3:
            expected = (rows * heads, length, keys)
        elif attn_mask.dim() == 4:  # 1 in place of the batch or the heads: the same mask for all of them
            given = attn_mask.shape[:2]
            expected = (1 if given[0] == 1 else rows, 1 if given[1] == 1 else heads, length, keys)
        if tuple(attn_mask.shape) != expected:
            raise MultiheadAttentionError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
                f" Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}"
            )
    if key_lengths is not None and batch is None:
        raise MultiheadAttentionError("key_lengths needs a batched query")


def attention_masks(
    batch: int,
    heads: int,
    length: int,
    keys: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    added_keys: int = 0,
    device: torch.device | None = None,
) -> dict:
    """The mask arguments of `kernels.attention` that say what nn.MultiheadAttention's masks say.

    Args:
        batch, heads, length, keys: B, H, L and S.
        key_padding_mask: (B, S) bool, True = ignore; or float, added to the scores.
        attn_mask: (L, S), (B·H, L, S) or (B or 1, H or 1, L, S) bool, True = ignore; or float, added to the scores.
        is_causal: query i sees keys 0 ... i (and what the masks leave of them).
        key_lengths: (B,) integers: keys at and beyond the length are ignored.
        added_keys: keys appended after the S given (add_bias_kv, add_zero_attn); every query sees them.
    """
    keep, bias = None, None
    causal = "top_left" if is_causal else False

    if key_padding_mask is not None and key_padding_mask.is_floating_point():
        key_padding_mask = as_bool_if_hard(key_padding_mask)
    if key_padding_mask is not None and not _hides_nothing(key_padding_mask):
        if key_padding_mask.dtype == torch.bool:
            real = ~key_padding_mask
            if key_lengths is None and added_keys == 0:
                key_lengths = lengths_if_padded_right(real)
                keep = None if key_lengths is not None else real[:, None, None, :]
            else:
                keep = real[:, None, None, :]
        else:
            bias = key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        by_query = attn_mask.view(batch, heads, length, keys) if attn_mask.dim() == 3 else attn_mask
        if attn_mask.dtype == torch.bool:
            keep = ~by_query if keep is None else keep & ~by_query
        else:
            bias = by_query if bias is None else bias + by_query

    if added_keys:
        if causal:
            lower = torch.ones(length, keys, dtype=torch.bool, device=device).tril()
            keep, causal = lower if keep is None else keep & lower, False
        if key_lengths is not None:
            real = torch.arange(keys, device=device) < key_lengths[:, None, None, None]
            keep, key_lengths = real if keep is None else keep & real, None
        keep = None if keep is None else F.pad(keep, (0, added_keys), value=True)
        bias = None if bias is None else F.pad(bias, (0, added_keys))
    return {"keep": keep, "bias": bias, "causal": causal, "k_lengths": key_lengths}


def _hides_nothing(mask: Tensor) -> bool:
    return mask.dtype == torch.bool and may_look(mask) and not bool(mask.any())


def may_look(x: Tensor) -> bool:
    """Whether Python may choose by the numbers in x: they cost nothing, and the choice holds for this call alone.

    Not on a GPU, which the host would wait for; not in what torch.compile, torch.jit, fake tensors or make_fx trace,
    nor in torch.func's vmap, where there is no one answer.
    """
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def require_rows(name: str, tokens: Tensor) -> None:
    """ValueError unless tokens are (B, L)."""
    if tokens.dim() != 2:
        raise ValueError(f"{name} must have shape (B, L), got {tuple(tokens.shape)}")


def real_lengths(tokens: Tensor, padding_idx: int) -> Tensor:
    """(B,) int64: the tokens of each row of (B, L) that are not padding.

    Raises:
        ValueError: tokens are not 2-D; or padding ahead of a token (looked for on the CPU only: a GPU would have to be
            waited for).
    """
    require_rows("tokens", tokens)
    real = tokens != padding_idx
    lengths = real.sum(-1)
    if may_look(tokens):
        before_end = torch.arange(tokens.shape[-1], device=tokens.device) < lengths[:, None]
        if not torch.equal(before_end, real):
            row = int((before_end != real).any(-1).nonzero()[0])
            raise ValueError(f"row {row} has padding (token {padding_idx}) ahead of a token; pad right")
    return lengths


def lengths_if_padded_right(keep: Tensor) -> Tensor | None:
    """(B,) int64 lengths if each row of `keep` (B, S) is True up to a length and False beyond, else None.

    Kernels skip what lies beyond a length, which a mask does not let them do. Asked on the CPU alone: elsewhere the
    answer would make the host wait for the device.
    """
    if not may_look(keep):
        return None
    lengths = keep.sum(-1)
    below = torch.arange(keep.shape[1], device=keep.device) < lengths[:, None]
    return lengths if torch.equal(below, keep) else None


def as_bool_if_hard(mask: Tensor) -> Tensor:
    """A float mask of only 0 and -inf (what nn.TransformerEncoder makes of a bool one) as bool again, on the CPU."""
    if mask.requires_grad or not may_look(mask):
        return mask
    ignored = mask == -torch.inf
    return ignored if bool((ignored | (mask == 0)).all()) else mask
