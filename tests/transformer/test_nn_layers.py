"""fused_transformer.nn's layers against torch.nn's from the same weights, forward and backward."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from fused_transformer import nn as ours_nn
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.nn_cases import (
    LAYER_OPTIONS,
    B,
    E,
    F,
    H,
    L,
    S,
    as_float,
    assert_same_as_torch,
    causal,
    make,
    padding,
    twins,
)

LAYERS = ("encoder_layer", "decoder_layer")
NAMES = {"encoder_layer": ("src",), "decoder_layer": ("tgt", "memory")}


def inputs(kind: str, batch_first: bool = True, batched: bool = True) -> dict:
    shapes = {"src": L, "tgt": L, "memory": S}
    tensors = {}
    for name in NAMES[kind]:
        shape = (B, shapes[name], E) if batched else (shapes[name], E)
        tensors[name] = normal(*shape) if batch_first or not batched else normal(*shape).transpose(0, 1)
    return tensors


def random_mask(*shape: int) -> torch.Tensor:
    """Key 0 is kept, so that no row is masked whole (torch's result would be NaN)."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


ENCODER_MASKS = {
    "none": lambda: {},
    "padding": lambda: {"src_key_padding_mask": padding(7, 2, 5, size=L)},
    "padding_float": lambda: {"src_key_padding_mask": as_float(padding(7, 2, 5, size=L))},
    "keys": lambda: {"src_key_padding_mask": random_mask(B, L)},
    "keys_soft": lambda: {"src_key_padding_mask": normal(B, L)},
    "causal": lambda: {"src_mask": causal(L)},
    "causal_hint": lambda: {"src_mask": causal(L), "is_causal": True},
    "causal_float_and_padding": lambda: {
        "src_mask": as_float(causal(L)),
        "src_key_padding_mask": as_float(padding(7, 2, 5, size=L)),
    },
    "pairs": lambda: {"src_mask": random_mask(L, L)},
    "pairs_soft": lambda: {"src_mask": normal(L, L)},
    "heads": lambda: {"src_mask": random_mask(B * H, L, L)},
    "heads_soft_and_keys": lambda: {"src_mask": normal(B * H, L, L), "src_key_padding_mask": normal(B, L)},
}
DECODER_MASKS = {
    "none": lambda: {},
    "causal": lambda: {"tgt_mask": causal(L), "tgt_is_causal": True},
    "padding": lambda: {
        "tgt_mask": as_float(causal(L)),
        "tgt_key_padding_mask": as_float(padding(7, 2, 5, size=L)),
        "memory_key_padding_mask": padding(9, 1, 4, size=S),
    },
    "pairs": lambda: {"tgt_mask": random_mask(L, L), "memory_mask": random_mask(L, S)},
    "soft": lambda: {"tgt_mask": normal(L, L), "memory_mask": normal(L, S), "memory_key_padding_mask": normal(B, S)},
    "heads": lambda: {"tgt_mask": random_mask(B * H, L, L), "memory_mask": random_mask(B * H, L, S)},
    "memory_causal": lambda: {"memory_mask": torch.ones(L, S).triu(1).bool(), "memory_is_causal": True},
}
MASKS = {"encoder_layer": ENCODER_MASKS, "decoder_layer": DECODER_MASKS}


@pytest.mark.parametrize(
    ("kind", "options", "mask"),
    [(kind, options, mask) for kind in LAYERS for options in ("post_norm", "pre_norm") for mask in MASKS[kind]]
    + [(kind, options, mask) for kind in LAYERS for options in LAYER_OPTIONS for mask in ("none", "padding")],
)
def test_a_layer_equals_torchs_forward_and_backward(kind, options, mask):
    ours, theirs = twins(kind, **LAYER_OPTIONS[options])
    tensors = inputs(kind, ours.self_attn.batch_first)
    assert_same_as_torch(ours, theirs, tensors, **MASKS[kind][mask]())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_inputs_equal_torchs(kind, norm_first):
    ours, theirs = twins(kind, norm_first=norm_first)
    masks = {
        "encoder_layer": {"src_mask": random_mask(H, L, L), "src_key_padding_mask": padding(4, size=L)[0]},
        "decoder_layer": {"tgt_mask": causal(L), "memory_key_padding_mask": padding(4, size=S)[0]},
    }[kind]
    assert_same_as_torch(ours, theirs, inputs(kind, batched=False), **masks)


# ------------------------------------------------------------------ the module as such


SAME_NAMES = (
    *("TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder"),
    *("Transformer", "MultiheadAttention", "LayerNorm", "RMSNorm"),
)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_signatures_are_torchs_and_what_is_more_is_keyword_only(name):
    ours, theirs = getattr(ours_nn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(theirs, method)).parameters
        got = inspect.signature(getattr(ours, method)).parameters
        assert [*expected] == [*got][: len(expected)]
        assert [p.default for p in expected.values()] == [p.default for p in got.values()][: len(expected)]
        assert all(p.kind is p.KEYWORD_ONLY for p in [*got.values()][len(expected) :])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # torch's own
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [*LAYERS, "encoder", "decoder", "transformer"])
def test_initial_values_and_names_are_torchs(kind, bias):
    torch.manual_seed(3)
    theirs = make(nn, kind, bias=bias)
    torch.manual_seed(3)
    ours = make(ours_nn, kind, bias=bias)
    assert_equal(ours.state_dict(), theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for module in ours.modules():
        assert type(module) not in (nn.MultiheadAttention, nn.LayerNorm, nn.TransformerEncoderLayer)


@pytest.mark.parametrize("kind", LAYERS)
def test_dtype_and_device_reach_the_parameters(kind):
    layer = make(ours_nn, kind, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    layer = make(ours_nn, kind, dtype=torch.bfloat16)
    tensors = {name: x.bfloat16() for name, x in inputs(kind).items()}
    assert layer(**tensors).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_activations_and_shapes_are_torchs_errors(kind):
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        make(ours_nn, kind, activation="swish")
    layer, tensors = make(ours_nn, kind), inputs(kind)
    name = NAMES[kind][0]
    with pytest.raises(AssertionError, match="was expecting embedding dimension of 24, but got 23"):
        layer(**tensors | {name: tensors[name][..., 1:]})
    with pytest.raises(RuntimeError, match="The shape of the 2D attn_mask"):
        layer(**tensors, **{f"{name}_mask": causal(L - 1)})
    with pytest.raises(AssertionError, match="key_padded_mask"):
        layer(**tensors, **{f"{name}_key_padding_mask": padding(3, 2, 5, size=L - 1)})


@pytest.mark.parametrize("kind", LAYERS)
def test_old_pickles_without_an_activation_get_relu(kind):
    layer = make(ours_nn, kind)
    state = {key: value for key, value in layer.__dict__.items() if key != "activation"}
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    tensors = inputs(kind)
    assert_equal(old(**tensors), layer(**tensors))
    assert layer.linear1.out_features == F
