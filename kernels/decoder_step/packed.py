"""A decoder's weights, packed once for many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fused_transformer.kernels import _native
from fused_transformer.kernels.linear import ACTIVATIONS, PackedLinear


class Norm(NamedTuple):
    """Weight and bias (E,) float32 of a LayerNorm; None: 1, and 0."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer.

    qkv: (3 E, E), of the self-attention; self_out: (E, E).
    query, memory_out: (E, E), of the attention to memory.
    up: (F, E); down: (E, F), of the feed-forward.
    norms: one for each sublayer, in order.
    """

    qkv: PackedLinear
    self_out: PackedLinear
    query: PackedLinear
    memory_out: PackedLinear
    up: PackedLinear
    down: PackedLinear
    norms: tuple[Norm, Norm, Norm]

    def linears(self) -> tuple[PackedLinear, ...]:
        return (self.qkv, self.self_out, self.query, self.memory_out, self.up, self.down)

    def map(self, change: Callable[[PackedLinear], PackedLinear]) -> PackedLayer:
        """The layer with each linear one changed."""
        qkv, self_out, query, memory_out, up, down = map(change, self.linears())
        return PackedLayer(qkv, self_out, query, memory_out, up, down, self.norms)


class PackedDecoder:
    """The layers of a decoder, E = H · D.

    Args:
        layers: one or more.
        num_heads: H.
        norm_first: pre-norm.
        eps: of every norm.
        activation: of the feed-forward: "none", "relu", "gelu" or "silu".
        final_norm: ends the stack; None: nothing does.

    Raises:
        ValueError: no layers, sizes that do not fit, or an unknown activation.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        num_heads: int,
        *,
        norm_first: bool = False,
        eps: float = 1e-5,
        activation: str = "relu",
        final_norm: Norm | None = None,
    ) -> None:
        if not layers:
            raise ValueError("a packed decoder needs at least one layer")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.layers, self.num_heads, self.norm_first = layers, num_heads, norm_first
        self.eps, self.activation, self.final_norm = eps, activation, final_norm
        self.width = layers[0].qkv.in_features
        if self.width % num_heads:
            raise ValueError(f"num_heads must divide the width, got {num_heads} and {self.width}")
        for layer in layers:
            hidden = layer.up.out_features
            wanted = ((3, 1), (1, 1), (1, 1), (1, 1))
            shapes = [(n * self.width, k * self.width) for n, k in wanted]
            shapes += [(hidden, self.width), (self.width, hidden)]
            got = [(x.out_features, x.in_features) for x in layer.linears()]
            if got != shapes:
                raise ValueError(f"the linear layers of a decoder layer must be {shapes}, got {got}")
        self.native = None
        if all(x.native is not None for layer in layers for x in layer.linears()):
            self.native = self._native()

    @property
    def nbytes(self) -> int:
        """Of the packed weights, which a step reads."""
        return sum(x.nbytes for layer in self.layers for x in layer.linears())

    def rounded(self, weights: str) -> PackedDecoder:
        """The same decoder with its matrices kept as `weights`, see `PackedLinear`."""

        def rounded(x: PackedLinear) -> PackedLinear:
            return PackedLinear(x.matrix(), x.bias, weights=weights)

        return PackedDecoder(
            [layer.map(rounded) for layer in self.layers],
            self.num_heads,
            norm_first=self.norm_first,
            eps=self.eps,
            activation=self.activation,
            final_norm=self.final_norm,
        )

    def _native(self):
        def addresses(norm: Norm) -> tuple[int, int]:
            return _native.ptr(norm.weight), _native.ptr(norm.bias)

        return _native.library().Decoder(
            self.width,
            self.num_heads,
            self.norm_first,
            self.eps,
            ACTIVATIONS[self.activation],
            [
                (
                    [(x.native, _native.ptr(x.bias)) for x in layer.linears()],
                    [addresses(norm) for norm in layer.norms],
                )
                for layer in self.layers
            ],
            None if self.final_norm is None else addresses(self.final_norm),
        )
