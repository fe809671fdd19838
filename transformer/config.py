"""The numbers that define a Transformer; the defaults are the paper's base model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from fused_transformer.embedding import POSITIONS
from fused_transformer.feed_forward import ACTIVATIONS

Ties = Literal["shared", "target", "separate"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What `Transformer` is built from. Immutable, checked when made; `to_dict` and `from_dict` for JSON.

    Args:
        source_vocab_size: V of the source.
        target_vocab_size: V of the target; None: the source's.
        d_model: E, the model's width.
        num_heads: H; must divide E.
        d_feedforward: F, width of the feed-forward networks.
        num_encoder_layers, num_decoder_layers: depth; 0 is allowed.
        dropout: of each sublayer's output and of the embeddings, in training.
        attention_dropout, activation_dropout: of the attention weights and of the feed-forward activations; the paper
            has none, torch.nn and tensor2tensor's later settings use `dropout` for them too.
        activation: "relu" (the paper), "gelu" or "silu".
        norm_first: LayerNorm ahead of each sublayer instead of after it, and one more at the end of each stack.
        layer_norm_eps: added to the variance.
        positions: "interleaved" (the paper), "concat_t2t", "concat_paper" or None; see `TokenEmbedding`.
        tie_embeddings: "shared" (or True): one table for source, target and output projection, as in the paper;
            "target": one for target and output projection; "separate" (or False): three.
        padding_idx, bos_idx, eos_idx: the special tokens' numbers.

    Raises:
        TypeError: a field is of another type; the numbers among them may be of torch or NumPy.
        ValueError: a number out of range, or two that contradict each other.

    Source: Vaswani et al. 2017, table 3; section 3.4 for the shared table.
    """

    source_vocab_size: int
    target_vocab_size: int = None  # type: ignore[assignment]  # never None once made
    d_model: int = 512
    num_heads: int = 8
    d_feedforward: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: str = "relu"
    norm_first: bool = False
    layer_norm_eps: float = 1e-5
    positions: str | None = "interleaved"
    tie_embeddings: Ties = "shared"
    padding_idx: int = 0
    bos_idx: int = 1
    eos_idx: int = 2

    def __post_init__(self) -> None:
        if self.target_vocab_size is None:
            object.__setattr__(self, "target_vocab_size", self.source_vocab_size)
        if isinstance(self.tie_embeddings, bool):
            object.__setattr__(self, "tie_embeddings", "shared" if self.tie_embeddings else "separate")

        for name in ("source_vocab_size", "target_vocab_size", "d_model", "num_heads", "d_feedforward"):
            self._check_integer(name, at_least=1)
        for name in ("num_encoder_layers", "num_decoder_layers", "padding_idx", "bos_idx", "eos_idx"):
            self._check_integer(name, at_least=0)
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads must divide d_model, got {self.num_heads} and {self.d_model}")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            self._make_float(name)
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        self._make_float("layer_norm_eps")
        if not 0.0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be positive and finite, got {self.layer_norm_eps}")
        if not isinstance(self.norm_first, bool):
            raise TypeError(f"norm_first must be a bool, got {type(self.norm_first).__name__}")
        self._check_choice("positions", (*POSITIONS, None))
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_choice("tie_embeddings", ("shared", "target", "separate"))
        if self.tie_embeddings == "shared" and self.source_vocab_size != self.target_vocab_size:
            raise ValueError(
                'tie_embeddings="shared" needs one vocabulary, got source_vocab_size '
                f'{self.source_vocab_size} and target_vocab_size {self.target_vocab_size}; use "target" or "separate"'
            )
        specials = [self.padding_idx, self.bos_idx, self.eos_idx]
        if len(set(specials)) < 3:
            raise ValueError(f"padding_idx, bos_idx and eos_idx must be three tokens, got {specials}")
        if max(specials) >= self.target_vocab_size or self.padding_idx >= self.source_vocab_size:
            raise ValueError(f"padding_idx, bos_idx and eos_idx must be tokens of the vocabulary, got {specials}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """The inverse of `to_dict`; ValueError for names that are not fields."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"TransformerConfig has no {', '.join(unknown)}")
        return cls(**values)

    def _check_integer(self, name: str, at_least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {value}")

    def _make_float(self, name: str) -> None:
        """A number of any library as Python's, which JSON takes; a string is none, though float() would read it."""
        value = getattr(self, name)
        try:
            if not hasattr(value, "__float__"):
                raise TypeError
            object.__setattr__(self, name, float(value))
        except (TypeError, ValueError, RuntimeError):  # the latter two of an array or tensor of several numbers
            raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None

    def _check_choice(self, name: str, choices: tuple) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
