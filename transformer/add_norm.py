"""Residual + dropout + LayerNorm, the step around each sublayer."""

from __future__ import annotations

from torch import Tensor, nn

from fused_transformer.kernels import add_layer_norm, add_layer_norm_with_total, layer_norm


class AddLayerNorm(nn.LayerNorm):
    """y = LayerNorm(residual + dropout(x)), read and written once.

    Parameters and state_dict are nn.LayerNorm's.

    Shapes: x and residual (..., E) to (..., E).
    Dtypes: that of x + residual. So under torch.autocast, where x comes from a linear in 16 bits and the embedding is
        float32, the stream stays float32 from layer to layer; see `fused_transformer.kernels.layer_norm`.
    Source: Vaswani et al. 2017, section 3.1 ("Add & Norm"); Ba et al. 2016, eq. 4.
    """

    def __init__(
        self, d_model: int, *, dropout: float = 0.0, eps: float = 1e-5, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(d_model, eps=eps, bias=bias, device=device, dtype=dtype)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """LayerNorm(residual + dropout(x)); of x alone where there is no residual."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps, dropout_p=self._dropout_p())

    def with_total(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the sum that was normalised: the residual stream of a pre-norm stack."""
        if residual is None:
            return self(x), x
        return add_layer_norm_with_total(x, residual, self.weight, self.bias, eps=self.eps, dropout_p=self._dropout_p())

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0
