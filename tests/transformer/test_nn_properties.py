"""Random layers and stacks, options and masks: torch.nn's results where torch is right, the formulas' where not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_transformer import nn as ours_nn
from tests.oracle import assert_matches
from tests.transformer import nn_naive as naive
from tests.transformer.nn_cases import as_float, assert_same_as_torch, causal, make, padding, randomised

SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ROOM = (8, 64)  # tensors of a few numbers: the largest of so few errors of torch's may happen to be small
ACTIVATIONS = ("relu", "gelu", nn.functional.gelu, torch.tanh, nn.ReLU(), nn.GELU("tanh"))


@st.composite
def layer_options(draw) -> dict:
    heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "d_model": heads * draw(st.sampled_from([4, 5, 8])),  # a norm of 1 or 2 numbers has a gradient of 0 and noise
        "nhead": heads,
        "dim_feedforward": draw(st.sampled_from([7, 9, 16])),
        "dropout": 0.0,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 0.1])),
        "batch_first": draw(st.booleans()),
        "norm_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }


@st.composite
def attention_mask(draw, batch: int, heads: int, queries: int, keys: int, square: bool) -> Tensor | None:
    """None, or bool or float, (L, S) or (N·H, L, S); any row may be masked whole."""
    form = draw(st.sampled_from(["none", "causal", "random", "soft"]))
    if form == "none" or (form == "causal" and not square):
        return None
    if form == "causal":
        mask = causal(queries)
        return draw(st.sampled_from([mask, as_float(mask)]))
    shape = (queries, keys) if draw(st.booleans()) else (batch * heads, queries, keys)
    torch.manual_seed(draw(st.integers(0, 999)))
    mask = torch.rand(shape) < draw(st.sampled_from([0.2, 0.7]))
    if form == "soft":
        return torch.randn(shape) + as_float(mask)
    return mask


@st.composite
def key_mask(draw, batch: int, keys: int) -> Tensor | None:
    form = draw(st.sampled_from(["none", "padding", "random", "soft"]))
    if form == "none":
        return None
    torch.manual_seed(draw(st.integers(0, 999)))
    if form == "soft":
        return torch.randn(batch, keys)
    if form == "padding":
        mask = padding(*torch.randint(0, keys + 1, (batch,)).tolist(), size=keys)
    else:
        mask = torch.rand(batch, keys) < 0.4
    return draw(st.sampled_from([mask, as_float(mask)]))


def allowed(batch: int, heads: int, mask: Tensor | None, keys: Tensor | None, shape: tuple[int, int]):
    """(N, H, L, S): what both masks allow, and what they add to the scores."""
    open_ = torch.ones(batch, heads, *shape, dtype=torch.bool)
    bias = torch.zeros(batch, heads, *shape)
    for given_mask in (mask, None if keys is None else keys[:, None, None, :]):
        if given_mask is None:
            continue
        full = given_mask.view(batch, heads, *shape) if given_mask.dim() == 3 else given_mask
        if full.dtype == torch.bool:
            open_ = open_ & ~full
        else:
            open_, bias = open_ & (full > -torch.inf), bias + torch.where(full > -torch.inf, full, 0.0)
    return open_, bias


@SETTINGS
@given(st.data())
def test_encoder_layers_equal_torchs_or_the_formula(data):
    options = data.draw(layer_options())
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    heads, width = options["nhead"], options["d_model"]
    mask = data.draw(attention_mask(batch, heads, length, length, square=True))
    keys = data.draw(key_mask(batch, length))
    hint = data.draw(st.booleans())

    theirs = randomised(nn.TransformerEncoderLayer(**options))
    ours = ours_nn.TransformerEncoderLayer(**options)
    ours.load_state_dict(theirs.state_dict())
    src = torch.randn(batch, length, width)
    open_, bias = allowed(batch, heads, mask, keys, (length, length))
    if hint:
        open_ = open_ & ~causal(length)
    call = {"src_mask": mask, "src_key_padding_mask": keys}
    if open_.any(-1).all():  # torch is right
        same = as_float(~open_) + bias
        their_call = {"src_mask": same.flatten(0, 1)}
        x = src if options["batch_first"] else src.transpose(0, 1)
        assert_same_as_torch(ours, theirs, {"src": x}, room=ROOM, their_options=their_call, is_causal=hint, **call)
        return

    @torch.no_grad()
    def judged(dtype):
        layer, x = copy.deepcopy(ours).to(dtype), src.to(dtype)
        return naive.layer(layer, x, lambda y: naive.attention(layer.self_attn, y, y, open_, bias.to(dtype))[0])

    with torch.no_grad():
        x = src if options["batch_first"] else src.transpose(0, 1)
        got = ours(x, is_causal=hint, **call)
    got = got if options["batch_first"] else got.transpose(0, 1)
    assert_matches(got, judged(torch.float64), judged(torch.float32), factor=ROOM[0], ulps=ROOM[1])


@SETTINGS
@given(st.data())
def test_decoder_layers_equal_torchs_or_the_formula(data):
    options = data.draw(layer_options())
    batch, length, size = (data.draw(st.integers(1, most)) for most in (4, 6, 7))
    heads, width = options["nhead"], options["d_model"]
    mask = data.draw(attention_mask(batch, heads, length, length, square=True))
    memory_mask = data.draw(attention_mask(batch, heads, length, size, square=False))
    keys, memory_keys = data.draw(key_mask(batch, length)), data.draw(key_mask(batch, size))

    theirs = randomised(nn.TransformerDecoderLayer(**options))
    ours = ours_nn.TransformerDecoderLayer(**options)
    ours.load_state_dict(theirs.state_dict())
    tgt, memory = torch.randn(batch, length, width), torch.randn(batch, size, width)
    own, own_bias = allowed(batch, heads, mask, keys, (length, length))
    cross, cross_bias = allowed(batch, heads, memory_mask, memory_keys, (length, size))

    @torch.no_grad()
    def judged(dtype):
        layer, x, m = copy.deepcopy(ours).to(dtype), tgt.to(dtype), memory.to(dtype)
        return naive.layer(
            layer,
            x,
            lambda y: naive.attention(layer.self_attn, y, y, own, own_bias.to(dtype))[0],
            lambda y: naive.attention(layer.multihead_attn, y, m, cross, cross_bias.to(dtype))[0],
        )

    call = {
        "tgt_mask": mask,
        "memory_mask": memory_mask,
        "tgt_key_padding_mask": keys,
        "memory_key_padding_mask": memory_keys,
    }
    batches = [x if options["batch_first"] else x.transpose(0, 1) for x in (tgt, memory)]
    with torch.no_grad():
        got = ours(*batches, **call)
    got = got if options["batch_first"] else got.transpose(0, 1)
    assert_matches(got, judged(torch.float64), judged(torch.float32), factor=ROOM[0], ulps=ROOM[1])


@SETTINGS
@given(st.data())
def test_stacks_equal_torchs_whatever_is_skipped(data):
    norm_first, batch_first = data.draw(st.booleans()), data.draw(st.booleans())
    skip, final_norm = data.draw(st.booleans()), data.draw(st.booleans())
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    theirs = make(nn, "encoder", norm_first=norm_first, batch_first=batch_first, final_norm=final_norm)
    ours = make(ours_nn, "encoder", norm_first=norm_first, batch_first=batch_first, final_norm=final_norm)
    ours.load_state_dict(randomised(theirs).state_dict())
    ours.skip_padding = skip
    lengths = [data.draw(st.integers(1, length)) for _ in range(batch)]
    hidden = padding(*lengths, size=length)
    src = torch.randn(batch, length, 24)
    src, rows = (src, ~hidden) if batch_first else (src.transpose(0, 1), ~hidden.T)
    mask = data.draw(st.sampled_from([None, causal(length)]))
    assert_same_as_torch(ours, theirs, {"src": src}, rows, room=ROOM, mask=mask, src_key_padding_mask=hidden)


@pytest.mark.parametrize("hint", [False, True])
def test_the_judge_agrees_with_torch_where_torch_is_right(hint):
    layer = randomised(make(nn, "encoder_layer")).double()
    src, mask = torch.randn(3, 7, 24, dtype=torch.float64), causal(7) if hint else None
    open_ = ~(causal(7) if hint else torch.zeros(7, 7, dtype=torch.bool))
    expected = naive.layer(layer, src, lambda y: naive.attention(layer.self_attn, y, y, open_)[0])
    torch.testing.assert_close(layer(src, src_mask=mask), expected)
