"""What the tests of fused_transformer.nn share: twins of ours and torch's, masks, and the judgement of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_transformer import nn as ours_nn
from tests.oracle import assert_matches, in_float64, run_with_gradients

B, L, S, E, H, F = 3, 7, 9, 24, 4, 40  # batch, queries, keys, width, heads, feed-forward width

LAYER_OPTIONS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu_length_first": {"activation": "gelu", "batch_first": False},
    "tanh_pre_norm": {"activation": torch.tanh, "norm_first": True},
    "gelu_module": {"activation": nn.GELU(approximate="tanh")},
    "eps_length_first": {"layer_norm_eps": 0.1, "norm_first": True, "batch_first": False},
    "no_bias": {"bias": False},
}


def padding(*lengths: int, size: int) -> Tensor:
    """True at padding, as torch.nn's masks are."""
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def randomised(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return module


def make(library, kind: str, *, layers: int = 2, final_norm: bool = True, **options) -> nn.Module:
    """A layer, stack or Transformer of `library` (torch.nn or ours): "encoder_layer", "decoder", "transformer" ..."""
    options = {"batch_first": True, "dropout": 0.0} | options
    sizes = {"d_model": E, "nhead": H, "dim_feedforward": F}
    if kind == "transformer":
        return library.Transformer(**sizes, num_encoder_layers=layers, num_decoder_layers=layers, **options)
    name = "Encoder" if "encoder" in kind else "Decoder"
    layer = getattr(library, f"Transformer{name}Layer")(**sizes, **options)
    if "layer" in kind:
        return layer
    norm = library.LayerNorm(E) if final_norm else None
    more = {"enable_nested_tensor": False} if name == "Encoder" else {}
    return getattr(library, f"Transformer{name}")(layer, layers, norm, **more)


def twins(kind: str, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same random weights, each layer its own."""
    theirs = randomised(make(nn, kind, **options))
    ours = make(ours_nn, kind, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def length_first(module: nn.Module) -> bool:
    return not next(part for part in module.modules() if isinstance(part, nn.MultiheadAttention)).batch_first


def results(module: nn.Module, tensors: dict[str, Tensor], rows=..., exact: bool = False, **options):
    """The output (its `rows`) and the gradients of inputs and parameters; `exact`: all in float64."""
    names = dict(module.named_parameters())

    def call(**leaves):
        arguments = {name: leaves[name] for name in tensors}
        return functional_call(module, {name: leaves[name] for name in names}, (), arguments | options)[rows]

    leaves = names | tensors
    if not exact:
        return run_with_gradients(call, leaves)
    return run_with_gradients(call, in_float64(leaves), rounded_to=torch.float32)


def assert_same_as_torch(ours, theirs, tensors, rows=..., their_options=None, room=(4, 8), **options) -> None:
    """Forward and backward: ours is about as near to torch's float64 as torch's float32 is.

    Room: 4 and 8, as for the attention alone (torch keeps its weights, and ours are made again from lse).
    """
    their_options = options if their_options is None else their_options
    exact = results(theirs, tensors, rows, exact=True, **their_options)
    naive = results(theirs, tensors, rows, **their_options)
    assert all(x.isfinite().all() for x in exact.values())
    assert_matches(results(ours, tensors, rows, **options), exact, naive, factor=room[0], ulps=room[1])
