"""How a model's layers run in training: as they are, with their activations computed a second time, or compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from fused_transformer.model import Transformer


def run_layer(layer: nn.Module, recompute: bool, *arguments: Any, **options: Any) -> Any:
    """What the layer returns; where `recompute`, only its inputs are kept for the backward pass.

    Its activations are computed again there, with the dropout of the first time: its seeds are drawn from torch's
    generators, which are set back to where they were.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *arguments, use_reentrant=False, **options)
    return layer(*arguments, **options)


def checkpoint_activations(model: Transformer, enabled: bool = True) -> None:
    """Let the layers keep their inputs alone between forward and backward pass: less memory, a third more time.

    Gradients are the same bits.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    model.encoder.checkpoint_activations = model.decoder.checkpoint_activations = enabled


def compile_layers(model: Transformer, backend: str = "inductor") -> None:
    """torch.compile for each layer of the stacks, one graph for all lengths; names and weights stay as they are.

    What is around the layers stays eager: there padding is packed away ahead of them, as in a model not compiled.
    """
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.compile(backend=backend, dynamic=True)
