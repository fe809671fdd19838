"""MultiheadAttention of nested tensors: what is in them is a packed batch, in the jagged layout as in the strided."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fused_transformer.masks import MultiheadAttentionError, check_axes
from fused_transformer.packing import Packing

if TYPE_CHECKING:
    from fused_transformer.attention import MultiheadAttention


class Sequences(NamedTuple):
    """A nested tensor of N sequences: sequence n is values[offsets[n]:offsets[n+1]]."""

    values: Tensor  # (T, E)
    offsets: Tensor  # (N + 1,)
    layout: torch.layout

    @classmethod
    def of(cls, x: Tensor) -> Sequences:
        if x.layout == torch.jagged:
            return cls(x.values(), x.offsets(), x.layout)  # type: ignore[attr-defined]
        sequences = x.unbind()
        lengths = torch.tensor([0, *map(len, sequences)], device=x.device)
        return cls(torch.cat(sequences), lengths.cumsum(0), x.layout)

    def packing(self) -> Packing:
        lengths = self.offsets.diff()
        return Packing.of(lengths, (len(lengths), int(lengths.max())))

    def nested(self, values: Tensor) -> Tensor:
        """The nested tensor of these lengths with other values."""
        if self.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(values, self.offsets)
        return torch.nested.as_nested_tensor(list(values.split(self.offsets.diff().tolist())))


def forward_nested(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    masked: bool,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """`module(query, key, value)` of nested tensors, (N, L*, E) and (N, S*, ...), each sequence by itself.

    Returns:
        out: nested as query is.
        weights: an ordinary tensor, (N, L, S) or (N, H, L, S) with L and S those of the longest sequences; 0 in the
            rows of queries that there are not. None if not need_weights.
    """
    check_axes(query)
    inputs = (query, key, value)
    alike = all(x.is_nested and x.layout == query.layout and x.dim() == 3 and x.is_contiguous() for x in inputs)
    if masked or not alike or not module.batch_first:
        raise MultiheadAttentionError(
            "nested tensors are supported where query, key and value all are (3-D, contiguous, of one layout), with "
            "batch_first=True and no mask but is_causal; else pass padded tensors and key_padding_mask or key_lengths"
        )
    seen = {id(x): Sequences.of(x) for x in inputs}  # one for tensors that are one, which are then projected at once
    q, k, v = (seen[id(x)] for x in inputs)
    if not len(q.offsets) == len(k.offsets) == len(v.offsets):
        raise MultiheadAttentionError("nested query, key and value must have the same number of sequences")
    if v is not k and not torch.equal(k.offsets, v.offsets):
        raise MultiheadAttentionError("nested key and value must have sequences of the same lengths")

    if not (need_weights or module.bias_k is not None or module.add_zero_attn):
        out, _ = module.forward(
            q.values,
            k.values,
            v.values,
            need_weights=False,
            is_causal=is_causal,
            q_offsets=q.offsets,
            k_offsets=k.offsets,
        )
        return q.nested(out), None

    q_packing = q.packing()
    k_packing = q_packing if k is q else k.packing()
    padded = {id(x): (q_packing if x is q else k_packing).unpack(x.values) for x in (q, k, v)}
    out, weights = module.forward(
        padded[id(q)],
        padded[id(k)],
        padded[id(v)],
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        key_lengths=k.offsets.diff(),
    )
    if weights is not None:
        real = torch.arange(weights.shape[-2], device=weights.device) < q.offsets.diff()[:, None]
        weights = weights.where((real if average_attn_weights else real[:, None])[..., None], 0.0)
    return q.nested(q_packing.pack(out)), weights
