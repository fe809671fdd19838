"""The position-wise feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fused_transformer.kernels.bias_act import ACTIVATIONS as FUSED
from fused_transformer.kernels.bias_act import bias_act, has_kernel
from fused_transformer.products import applied

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """FFN(x) = dropout(activation(x W₁ + b₁)) W₂ + b₂.

    Args:
        d_model: E, width of x and of the result.
        d_feedforward: F, width in between.
        dropout: probability, in training, of zeroing an activation. The paper has none here.
        activation: "relu", as in the paper, "gelu", or "silu" (Marian's swish; torch's own function on every device).
        bias: whether there are b₁ and b₂.

    Shapes: (..., E) to (..., E).

    Initial weights: Xavier uniform; biases 0.

    Source: Vaswani et al. 2017, eq. 2.
    """

    def __init__(
        self,
        d_model: int = 512,
        d_feedforward: int = 2048,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.linear1 = nn.Linear(d_model, d_feedforward, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.dropout, self.activation = dropout, activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = applied(self.linear1, x)  # with its bias, which a matrix product adds for nothing
        dropout_p = self.dropout if self.training else 0.0
        if self.activation in FUSED and has_kernel(hidden, self.activation, dropout_p):
            hidden = bias_act(hidden, activation=self.activation, dropout_p=dropout_p)
        else:
            hidden = F.dropout(ACTIVATIONS[self.activation](hidden), dropout_p, self.training)
        return applied(self.linear2, hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dropout={self.dropout}"
