"""Token embedding with sinusoidal positions."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from fused_transformer.kernels import embedding

Layout = Literal["interleaved", "concat_t2t", "concat_paper"]
POSITIONS = ("interleaved", "concat_t2t", "concat_paper")


class TokenEmbedding(nn.Module):
    """y[i] = dropout(√E · weight[token i] + PE[start + i]), and 0 where token i is padding.

    Args:
        vocab_size: V, rows of the table.
        d_model: E, its width.
        positions: the table of positions, since a model trained with one is wrong under another:
            "interleaved" PE[p, 2i] = sin(p / 10000^(2i/E)), PE[p, 2i+1] = cos(same): the paper;
            "concat_t2t" [sin(p·w), cos(p·w)], w_k = 10000^(-k/(E/2 - 1)): tensor2tensor, fairseq, Marian;
            "concat_paper" the same halves with the paper's frequencies: Hugging Face's Marian;
            None: no positions.
        padding_idx: the token whose rows are 0 and give no gradient; None: there is none.
        dropout: probability, in training, of zeroing an element of the sum.

    Shapes: tokens (B, L) int32 or int64; y (B, L, E) in weight's dtype, under torch.autocast too. Any length: the table
        is never a limit.

    Initial weights: normal with standard deviation E^-½ (as tensor2tensor), so √E · weight has variance 1, and so have
    the logits where the table is also the output projection.

    Source: Vaswani et al. 2017, sections 3.4, 3.5 and 5.4.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        positions: str | None = "interleaved",
        padding_idx: int | None = 0,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if positions is not None and positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)} or None, got {positions!r}")
        self.positions = cast("Layout | None", positions)
        self.padding_idx, self.dropout = padding_idx, dropout
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # there is nothing to draw, for which torch would load its compiler: seconds
            return
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, *, start: int | Tensor = 0) -> Tensor:
        """tokens (B, L) to (B, L, E); `start` is the position of the first token, one number or (B,)."""
        return embedding(
            tokens,
            self.weight,
            positions=self.positions,
            start=0 if self.positions is None else start,
            padding_idx=self.padding_idx,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        vocab_size, d_model = self.weight.shape
        return f"{vocab_size}, {d_model}, positions={self.positions}, padding_idx={self.padding_idx}"
