"""Which keys an attention may see: torch.nn's masks as the caller gave them, and what a stack found out about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fused_transformer.masks import as_bool_if_hard, lengths_if_padded_right, may_look
from fused_transformer.nn.parts import Stream
from fused_transformer.packing import Packing


@dataclass(frozen=True)
class Keys:
    """The masks of one attention, as `MultiheadAttention.forward` takes them; all that are given combine.

    is_causal is a mask like the others here, never a promise about attn_mask: with both, a query attends to what both
    allow. lengths and offsets are for our own MultiheadAttention alone.
    """

    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    is_causal: bool = False
    lengths: Tensor | None = None
    q_offsets: Tensor | None = None
    k_offsets: Tensor | None = None

    def attend(
        self, attention: nn.Module, query: Tensor, memory: Tensor, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output, and each head's weights if wanted."""
        options: dict = {
            "attn_mask": self.attn_mask,
            "key_padding_mask": self.key_padding_mask,
            "is_causal": self.is_causal,
            "need_weights": wants_weights,
        }
        if wants_weights:
            options["average_attn_weights"] = False
        ours = {"key_lengths": self.lengths, "q_offsets": self.q_offsets, "k_offsets": self.k_offsets}
        options |= {name: value for name, value in ours.items() if value is not None}
        return attention(query, memory, memory, **options)

    def settled(self, batch: int | None, queries: int, keys: int) -> Keys:
        """The same, said so that a kernel can skip what is masked: a causal mask as is_causal, padding as lengths.

        On the CPU alone (elsewhere the host would wait for the device), and only masks of the right shape: of the
        others the attention complains.
        """
        attn_mask, is_causal = self.attn_mask, self.is_causal
        if attn_mask is not None and tuple(attn_mask.shape) == (queries, keys):
            attn_mask = as_bool_if_hard(attn_mask) if attn_mask.is_floating_point() else attn_mask
            if _is_causal(attn_mask):
                attn_mask, is_causal = None, True
        padding, lengths = self.key_padding_mask, self.lengths
        if padding is not None and lengths is None and tuple(padding.shape) == (batch, keys):
            padding = as_bool_if_hard(padding) if padding.is_floating_point() else padding
            lengths = lengths_if_padded_right(~padding) if padding.dtype == torch.bool else None
            padding = padding if lengths is None else None
        return replace(self, attn_mask=attn_mask, key_padding_mask=padding, is_causal=is_causal, lengths=lengths)

    @property
    def packable(self) -> bool:
        """Whether there are no masks but lengths and is_causal, which a packed batch can have too."""
        return self.attn_mask is None and self.key_padding_mask is None

    def packed(self, queries: Packing, k_offsets: Tensor | None = None) -> Keys:
        """For the batch that `queries` packs; its keys are the queries, or where k_offsets say."""
        return Keys(is_causal=self.is_causal, q_offsets=queries.offsets, k_offsets=k_offsets)


def _is_causal(mask: Tensor) -> bool:
    if mask.dtype != torch.bool or not may_look(mask):
        return False
    return torch.equal(mask, torch.ones_like(mask).triu(1))


def padded_rows(key_padding_mask: Tensor) -> Tensor:
    """(B, S) bool: True at padding on the right. All False if the mask hides anything else."""
    if key_padding_mask.dtype == torch.bool:
        hidden = hard = key_padding_mask
    else:
        hidden = key_padding_mask == -torch.inf
        hard = hidden | (key_padding_mask == 0)
    lengths = (~hidden).sum(-1, keepdim=True)
    beyond = torch.arange(hidden.shape[-1], device=hidden.device) >= lengths
    right = (hidden == beyond).all()
    return hidden & (right if hard is hidden else right & hard.all())


def run_nested(nested: Tensor, is_causal: bool, run: Callable[[Stream, Keys], Tensor]) -> Tensor:
    """A nested tensor is a packed batch: `run` gets it as such, and its result becomes nested again."""
    if nested.layout == torch.jagged:
        if nested.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError("jagged tensors with holes between their sequences are not supported: call contiguous()")
        offsets = nested.offsets()  # type: ignore[attr-defined]
        out = run(Stream(nested.values()), Keys(is_causal=is_causal, q_offsets=offsets))
        return torch.nested.nested_tensor_from_jagged(out, offsets)
    sequences = nested.unbind()
    lengths = [len(sequence) for sequence in sequences]
    offsets = torch.tensor([0, *lengths], device=nested.device).cumsum(0)
    out = run(Stream(torch.cat(sequences)), Keys(is_causal=is_causal, q_offsets=offsets))
    return torch.nested.as_nested_tensor(list(out.split(lengths)))
