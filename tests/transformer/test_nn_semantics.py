"""Where fused_transformer.nn must do better than torch.nn: empty rows, hints, weights; and nested tensors, dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import nn as ours_nn
from fused_transformer.kernels import OPS, use_backend
from tests.inputs import normal, running_on
from tests.oracle import assert_equal, assert_matches
from tests.transformer import nn_naive as naive
from tests.transformer.nn_cases import B, E, H, L, S, as_float, causal, make, padding, randomised, twins

# ------------------------------------------------------------------ rows with nothing to attend to


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_row_with_nothing_to_attend_to_is_no_nan(norm_first):
    layer, theirs = twins("encoder_layer", norm_first=norm_first)
    src, hidden = normal(B, L, E), padding(7, 0, 5, size=L)
    mask = torch.rand(L, L) < 0.5
    mask[3] = True
    allowed = ~(hidden[:, None, None, :] | mask)

    @torch.no_grad()
    def judged(dtype):
        module, x = copy.deepcopy(theirs).to(dtype), src.to(dtype)
        return naive.layer(module, x, lambda y: naive.attention(module.self_attn, y, y, allowed)[0])

    got = layer(src, src_mask=mask, src_key_padding_mask=hidden)
    assert got.isfinite().all()
    assert_matches(got.detach(), judged(torch.float64), judged(torch.float32), factor=4, ulps=8)
    got.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_row_with_no_memory_to_attend_to_is_no_nan(norm_first):
    layer, theirs = twins("decoder_layer", norm_first=norm_first)
    tgt, memory, hidden = normal(B, L, E), normal(B, S, E), padding(9, 0, 4, size=S)
    own, of_memory = ~causal(L)[None, None], ~hidden[:, None, None, :]

    @torch.no_grad()
    def judged(dtype):
        module, x, m = copy.deepcopy(theirs).to(dtype), tgt.to(dtype), memory.to(dtype)
        return naive.layer(
            module,
            x,
            lambda y: naive.attention(module.self_attn, y, y, own)[0],
            lambda y: naive.attention(module.multihead_attn, y, m, of_memory)[0],
        )

    got = layer(tgt, memory, tgt_is_causal=True, memory_key_padding_mask=hidden)
    assert_matches(got.detach(), judged(torch.float64), judged(torch.float32), factor=4, ulps=8)


# ------------------------------------------------------------------ is_causal


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder"])
def test_a_hint_never_shows_a_row_what_the_mask_or_the_hint_hides(kind, mode):
    module, _ = twins(kind)
    module.train(mode == "train")
    name = "src" if "encoder" in kind else "tgt"
    tensors = {"src": {"src": normal(B, L, E)}, "tgt": {"tgt": normal(B, L, E), "memory": normal(B, S, E)}}[name]
    mask_name = "mask" if kind == "encoder" else f"{name}_mask"
    hint = "is_causal" if name == "src" else "tgt_is_causal"
    everything, lower = torch.zeros(L, L, dtype=torch.bool), causal(L)
    band = lower | torch.ones(L, L).tril(-3).bool()
    with torch.set_grad_enabled(mode != "no_grad"):
        for mask, both in (
            (None, lower),
            (everything, lower),
            (lower.T, lower | lower.T),
            (band, band),
            (lower, lower),
        ):
            got = module(**tensors, **{mask_name: mask, hint: True})
            expected = module(**tensors, **{mask_name: both, hint: False})
            torch.testing.assert_close(got, expected)
        # and what a row may not see does not reach it
        changed = tensors | {name: torch.cat([tensors[name][:, :3], normal(B, L - 3, E)], 1)}
        for mask in (None, everything, lower):
            options = {mask_name: mask, hint: True}
            assert_equal(module(**changed, **options)[:, :3], module(**tensors, **options)[:, :3])


def test_no_hint_and_no_mask_is_no_causality():
    module, theirs = twins("decoder")
    tgt, memory = normal(B, L, E), normal(B, S, E)
    torch.testing.assert_close(module(tgt, memory), theirs(tgt, memory))


# ------------------------------------------------------------------ masks of four axes


@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder", "transformer"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("axes", [(1, 1), (B, 1), (1, H), (B, H)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["bool", "float"])
def test_a_mask_of_four_axes_is_that_of_each_head(kind, batch_first, axes, soft):
    def masks(size: int) -> tuple[Tensor, Tensor]:
        mask = torch.rand(*axes, L, size) < 0.5
        mask[..., 0] = False
        mask = normal(*axes, L, size) + as_float(mask) if soft else mask
        return mask, mask.expand(B, H, L, size).flatten(0, 1)

    model = randomised(make(ours_nn, kind, batch_first=batch_first))
    src, memory = (x if batch_first else x.transpose(0, 1) for x in (normal(B, L, E), normal(B, S, E)))
    own, cross = masks(L), masks(S)
    if "encoder" in kind:
        name = "src_mask" if "layer" in kind else "mask"
        got, expected = (model(src, **{name: mask}) for mask in own)
    elif "decoder" in kind:
        got, expected = (model(src, memory, tgt_mask=a, memory_mask=b) for a, b in zip(own, cross, strict=True))
    else:
        got, expected = (model(src, src, src_mask=mask, tgt_mask=mask, memory_mask=mask) for mask in own)
    assert_equal(got, expected)


# ------------------------------------------------------------------ return_attention


def weights_of(attention: nn.MultiheadAttention, query, memory, **masks):
    return attention(query, memory, memory, average_attn_weights=False, **masks)[1]


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_return_each_heads_weights(norm_first):
    ours, theirs = twins("encoder_layer", norm_first=norm_first)
    src, hidden = normal(B, L, E), padding(7, 2, 5, size=L)
    out, weights = ours(src, src_key_padding_mask=hidden, return_attention=True)
    assert_equal(out, ours(src, src_key_padding_mask=hidden))
    x = theirs.norm1(src) if norm_first else src
    torch.testing.assert_close(weights, weights_of(theirs.self_attn, x, x, key_padding_mask=hidden))
    assert ours(src[0], return_attention=True)[1].shape == (H, L, L)

    ours, theirs = twins("decoder_layer", norm_first=norm_first)
    memory = normal(B, S, E)
    out, (own, cross) = ours(src, memory, tgt_is_causal=True, return_attention=True)
    assert_equal(out, ours(src, memory, tgt_is_causal=True))
    x = theirs.norm1(src) if norm_first else src
    torch.testing.assert_close(own, weights_of(theirs.self_attn, x, x, attn_mask=causal(L)))
    assert cross.shape == (B, H, L, S)
    torch.testing.assert_close(cross.sum(-1), torch.ones(B, H, L))


@pytest.mark.parametrize("hooked", [False, True])
def test_stacks_return_every_layers_weights(hooked):
    model, theirs = twins("transformer", layers=3)
    if hooked:  # then the layers are called one by one
        for stack in (model.encoder, model.decoder):
            stack.layers[1].register_forward_hook(lambda *_: None)
    src, tgt, hidden = normal(B, S, E), normal(B, L, E), padding(9, 1, 4, size=S)
    options = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden, "tgt_is_causal": True}
    out, weights = model(src, tgt, **options, return_attention=True)
    torch.testing.assert_close(out, model(src, tgt, **options))
    shapes = {"encoder": (B, H, S, S), "decoder": (B, H, L, L), "memory": (B, H, L, S)}
    for name, shape in shapes.items():
        assert [w.shape for w in getattr(weights, name)] == [shape] * 3
    assert all((w * hidden[:, None, None, :] == 0).all() for w in (*weights.encoder, *weights.memory))
    assert all((w * causal(L) == 0).all() for w in weights.decoder)
    x = src
    for layer, seen in zip(theirs.encoder.layers, weights.encoder, strict=True):
        torch.testing.assert_close(seen, weights_of(layer.self_attn, x, x, key_padding_mask=hidden))
        x = layer(x, src_key_padding_mask=hidden)


def test_returned_weights_have_a_gradient():
    layer, _ = twins("encoder_layer")
    src = normal(B, L, E).requires_grad_()
    layer(src, return_attention=True)[1].square().sum().backward()
    assert src.grad.abs().sum() > 0


def test_layers_of_others_return_no_attention():
    encoder = ours_nn.TransformerEncoder(make(nn, "encoder_layer"), 1)
    decoder = ours_nn.TransformerDecoder(make(nn, "decoder_layer"), 1)
    for call in (
        lambda: encoder(normal(B, S, E), return_attention=True),
        lambda: decoder(normal(B, L, E), normal(B, S, E), return_attention=True),
    ):
        with pytest.raises(ValueError, match=r"needs layers of fused_transformer\.nn, got Transformer..coderLayer"):
            call()


# ------------------------------------------------------------------ nested tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("kind", ["encoder_layer", "encoder"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors_go_in_and_come_out(kind, is_causal, layout):
    module, _ = twins(kind)
    sequences = [normal(length, E) for length in (7, 1, 4)]
    leaves = [x.clone().requires_grad_() for x in sequences]
    nested = torch.nested.as_nested_tensor(leaves, layout=layout)
    out = module(nested, is_causal=is_causal)
    assert out.is_nested and out.layout == layout
    if layout == torch.jagged:
        assert (nested + out).is_nested  # the same ragged axis
    singles = [x.clone().requires_grad_() for x in sequences]
    expected = [module(x[None], is_causal=is_causal)[0] for x in singles]
    torch.testing.assert_close(list(out.unbind()), expected)
    gradients = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(sum(x.square().sum() for x in expected), singles))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_torchs_encoder_may_hand_our_layers_nested_tensors():
    theirs = randomised(nn.TransformerEncoder(make(nn, "encoder_layer"), 2))
    mixed = nn.TransformerEncoder(make(ours_nn, "encoder_layer"), 2)
    mixed.load_state_dict(theirs.state_dict())
    src, hidden = normal(B, S, E), padding(9, 1, 4, size=S)
    with torch.no_grad():
        torch.testing.assert_close(
            mixed.eval()(src, src_key_padding_mask=hidden), theirs.eval()(src, src_key_padding_mask=hidden)
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_with_masks_are_refused():
    layer = make(ours_nn, "encoder_layer")
    nested = torch.nested.as_nested_tensor([normal(3, E), normal(2, E)])
    unknown = make(ours_nn, "encoder", activation=torch.tanh)
    narrow = torch.nested.narrow(normal(2, 5, E), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged)
    for module in (layer, make(ours_nn, "encoder")):
        with pytest.raises(ValueError, match="holes between their sequences"):
            module(narrow)
    calls = [(layer, {"src_mask": causal(3)}), (layer, {"return_attention": True}), (unknown, {})]
    for module, options in calls:
        with pytest.raises(ValueError, match="nested tensors are supported without masks"):
            module(nested, **options)


# ------------------------------------------------------------------ dropout


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2", "dropout3", "self_attn", "multihead_attn"])
def test_every_dropout_of_the_layer_drops_in_training_alone(name, norm_first):
    layer, _ = twins("decoder_layer", norm_first=norm_first)
    tgt, memory = normal(B, L, E), normal(B, S, E)
    expected = layer(tgt, memory)
    if "attn" in name:
        getattr(layer, name).dropout = 0.5
    else:
        getattr(layer, name).p = 0.5
    assert not torch.allclose(layer(tgt, memory), expected)
    torch.manual_seed(5)
    first = layer(tgt, memory)
    torch.manual_seed(5)
    assert_equal(layer(tgt, memory), first)
    assert_equal(layer.eval()(tgt, memory), expected)
    if "attn" not in name:
        getattr(layer, name).train()  # a part's own mode counts, as it does in torch.nn
        assert not torch.allclose(layer(tgt, memory), expected)


def test_the_sum_is_dropped_with_the_given_rate_and_scale():
    layer = make(ours_nn, "encoder_layer", norm_first=True, dropout=0.3)
    for name, parameter in layer.named_parameters():
        if "norm" not in name:
            nn.init.zeros_(parameter)
    nn.init.ones_(layer.linear2.bias)  # so that only dropout(1) is added to x
    for stack in (layer, ours_nn.TransformerEncoder(layer, 1)):
        src = normal(60, 40, E)
        added = stack(src) - src
        dropped = added.abs() < 1e-6
        assert abs(dropped.double().mean() - 0.3) < 0.01  # 57,600 draws: 5 standard deviations
        torch.testing.assert_close(added[~dropped], torch.full_like(added[~dropped], 1 / 0.7))


def test_activations_are_dropped():
    layer = make(ours_nn, "encoder_layer")
    layer.dropout.p = 1.0
    nn.init.zeros_(layer.linear2.bias)
    src = normal(B, L, E)
    x = layer.norm1(src + layer.self_attn(src, src, src)[0])
    torch.testing.assert_close(layer(src), layer.norm2(x))


# ------------------------------------------------------------------ backends


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "reference"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_backend_computes_the_layers(norm_first, backend, device):
    """bias_act, attention with a mask, its weights, sum and norm: forward and backward, dropout and all."""
    layer, _ = twins("decoder_layer", norm_first=norm_first, dropout=0.2)
    layer.to(device)
    if isinstance(OPS["bias_act"].module(backend), str):
        layer.dropout.p = 0.0  # torch drops the activations then, by bits of its own
    tgt, memory = (normal(B, size, E, device=device).requires_grad_() for size in (L, S))
    hidden = padding(9, 1, 4, size=S).to(device)

    def run():
        torch.manual_seed(11)
        out, (own, cross) = layer(
            tgt, memory, tgt_is_causal=True, memory_key_padding_mask=hidden, return_attention=True
        )
        leaves = [tgt, memory, *layer.parameters()]
        return out, own, cross, *torch.autograd.grad(out.square().sum() + cross.square().sum(), leaves)

    with use_backend("reference"):
        expected = run()
    with running_on(backend):
        got = run()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
