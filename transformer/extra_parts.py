"""Parts that other libraries' models have beside the paper's: norms after post-norm stacks, a bias of the logits.

`TransformerConfig` does not name them, the weights do: `fused_transformer.integrations` adds them to the models that
need them, and loading a checkpoint adds them where it holds their weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fused_transformer.add_norm import AddLayerNorm
from fused_transformer.config import TransformerConfig
from fused_transformer.model import Transformer

FINAL_NORMS = ("encoder", "decoder")  # the stacks that may end with a norm


def add_final_norm(model: Transformer, stack: str) -> None:
    """One more LayerNorm at the end of a post-norm stack, as nn.Transformer has; nothing where there is one already.

    Args:
        stack: "encoder" or "decoder".
    """
    module = getattr(model, stack)
    if module.norm is None:
        table = model.source_embedding.weight
        module.norm = AddLayerNorm(
            model.config.d_model, eps=model.config.layer_norm_eps, device=table.device, dtype=table.dtype
        )


def add_logits_bias(model: Transformer) -> None:
    """A bias of the output projection, zeros to begin with; nothing where there is one already.

    Raises:
        ValueError: the projection is the target's table of embeddings, which has no bias.
    """
    projection = model.output_projection
    if projection is None:
        raise ValueError('a bias of the logits needs tie_embeddings="separate": a table of embeddings has none')
    if projection.bias is None:
        projection.bias = nn.Parameter(torch.zeros_like(projection.weight[:, 0]))


def add_parts_in(model: Transformer, names: Iterable[str]) -> None:
    """Add the parts of a state_dict with these names."""
    names = set(names)
    for stack in FINAL_NORMS:
        if f"{stack}.norm.weight" in names:
            add_final_norm(model, stack)
    if "output_projection.bias" in names and model.output_projection is not None:
        add_logits_bias(model)


def with_weights(config: TransformerConfig, weights: dict[str, Tensor]) -> Transformer:
    """The model of a configuration with these weights, a whole state_dict, as its parameters: they are not copied.

    Raises:
        RuntimeError: a weight is missing, not the model's, or of another shape.
    """
    with torch.device("meta"):  # its initial weights would be drawn for nothing
        model = Transformer(config)
        add_parts_in(model, weights)
    model.load_state_dict(weights, assign=True)
    return model
