"""fused_transformer.nn's encoder, decoder and Transformer against torch.nn's, and what they do with padding."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from fused_transformer import nn as ours_nn
from fused_transformer import packing
from fused_transformer.nn import stacks
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.nn_cases import (
    B,
    E,
    H,
    L,
    S,
    as_float,
    assert_same_as_torch,
    causal,
    make,
    padding,
    randomised,
    twins,
)

SOURCE_PADDING, TARGET_PADDING = padding(9, 1, 4, size=S), padding(7, 2, 5, size=L)
OPTIONS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "length_first": {"batch_first": False, "norm_first": True, "activation": "gelu"},
    "no_final_norm": {"final_norm": False, "norm_first": True},
}


def by_batch(x, module):
    return x if getattr(module, "batch_first", True) else x.transpose(0, 1)


ENCODER_MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": SOURCE_PADDING},
    "causal": {"mask": causal(S)},
    "causal_and_padding": {"mask": as_float(causal(S)), "src_key_padding_mask": as_float(SOURCE_PADDING)},
    "hint": {"mask": causal(S), "is_causal": True},
    "pairs": {"mask": causal(S).flip(0, 1)},
}
DECODER_MASKS = {
    "none": {},
    "usual": {
        "tgt_mask": as_float(causal(L)),
        "tgt_key_padding_mask": as_float(TARGET_PADDING),
        "memory_key_padding_mask": SOURCE_PADDING,
    },
    "pairs": {"tgt_mask": causal(L).flip(0, 1), "memory_mask": torch.ones(L, S).triu(3).bool()},
    "hint": {"tgt_mask": causal(L), "tgt_is_causal": True},
    "memory_hint": {"memory_mask": torch.ones(L, S).triu(1).bool(), "memory_is_causal": True},
}


@pytest.mark.parametrize("mask", ENCODER_MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_an_encoder_equals_torchs_forward_and_backward(options, mask):
    ours, theirs = twins("encoder", **OPTIONS[options])
    src = normal(B, S, E) if ours.layers[0].self_attn.batch_first else normal(S, B, E)
    assert_same_as_torch(ours, theirs, {"src": src}, **ENCODER_MASKS[mask])


@pytest.mark.parametrize("mask", DECODER_MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_decoder_equals_torchs_forward_and_backward(options, mask):
    ours, theirs = twins("decoder", **OPTIONS[options])
    tensors = {"tgt": normal(B, L, E), "memory": normal(B, S, E)}
    if not ours.layers[0].self_attn.batch_first:
        tensors = {name: x.transpose(0, 1) for name, x in tensors.items()}
    assert_same_as_torch(ours, theirs, tensors, **DECODER_MASKS[mask])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_equals_torchs_forward_and_backward(norm_first, batch_first, masked):
    ours, theirs = twins("transformer", norm_first=norm_first, batch_first=batch_first)
    tensors = {"src": normal(B, S, E), "tgt": normal(B, L, E)}
    if not batch_first:
        tensors = {name: x.transpose(0, 1) for name, x in tensors.items()}
    masks = {
        "tgt_mask": as_float(causal(L)),
        "src_key_padding_mask": SOURCE_PADDING,
        "tgt_key_padding_mask": TARGET_PADDING,
        "memory_key_padding_mask": SOURCE_PADDING,
    }
    assert_same_as_torch(ours, theirs, tensors, **masks if masked else {})


@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_unbatched_inputs_equal_torchs(kind):
    ours, theirs = twins(kind)
    tensors = {
        "encoder": {"src": normal(S, E)},
        "decoder": {"tgt": normal(L, E), "memory": normal(S, E)},
        "transformer": {"src": normal(S, E), "tgt": normal(L, E)},
    }[kind]
    masks = {"src_key_padding_mask": padding(4, size=S)[0]} if kind != "decoder" else {"tgt_mask": causal(L)}
    assert_same_as_torch(ours, theirs, tensors, **masks)


def test_wrong_batches_and_widths_are_torchs_errors():
    model = make(ours_nn, "transformer")
    with pytest.raises(RuntimeError, match="the batch number of src and tgt must be equal"):
        model(normal(B, S, E), normal(B + 1, L, E))
    with pytest.raises(RuntimeError, match="the feature number of src and tgt must be equal to d_model"):
        model(normal(B, S, E), normal(B, L, E + 1))


def test_custom_stacks_are_called_as_they_are():
    class Double(nn.Module):
        def forward(self, x, *_, **__):
            return 2 * x

    model = ours_nn.Transformer(
        E,
        H,
        custom_encoder=Double(),
        custom_decoder=nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 8, batch_first=True), 1),
        batch_first=True,
    ).eval()
    assert type(model.decoder) is nn.TransformerDecoder
    src, tgt = normal(B, S, E), normal(B, L, E)
    assert_equal(model(src, tgt), model.decoder(tgt, 2 * src))
    with pytest.raises(ValueError, match=r"return_attention needs stacks of fused_transformer\.nn, got Double"):
        model(src, tgt, return_attention=True)


# ------------------------------------------------------------------ padding


MODES = {"train": torch.enable_grad, "eval": torch.enable_grad, "no_grad": torch.no_grad}
MODES["inference_mode"] = torch.inference_mode


def in_every_mode(module, *arguments, **options):
    """The results in train (without dropout), eval, no_grad and inference_mode, which must be the same bits."""
    out = {}
    for name, context in MODES.items():
        module.train(name == "train")
        with context():
            out[name] = module(*arguments, **options)
    for name in MODES:
        assert_equal(out[name], out["train"])
    return out["train"]


@contextlib.contextmanager
def one_path_in_torch():
    """Without nested tensors and the fast path, which zero rows of padding or not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def encoders(**options):
    """Ours and torch's, as one gets them by default: with enable_nested_tensor=True."""
    layer = make(nn, "encoder_layer", **options)
    theirs = randomised(nn.TransformerEncoder(layer, 2, nn.LayerNorm(E)))
    ours = ours_nn.TransformerEncoder(make(ours_nn, "encoder_layer", **options), 2, ours_nn.LayerNorm(E))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


HIDDEN = {
    "right": padding(9, 1, 4, size=S),
    "right_float": as_float(padding(9, 1, 4, size=S)),
    "left": padding(9, 1, 4, size=S).flip(1),
    "holes": torch.eye(B, S, dtype=torch.bool),
    "soft": as_float(padding(9, 1, 4, size=S)) + 0.5 * torch.eye(B, S),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("norm_first", [False, True])
def test_rows_that_are_hidden_as_keys_are_computed_in_every_mode(norm_first, hidden):
    ours, theirs = encoders(norm_first=norm_first)
    src = normal(B, S, E)
    with one_path_in_torch():
        expected = theirs(src, src_key_padding_mask=HIDDEN[hidden])
    torch.testing.assert_close(in_every_mode(ours, src, src_key_padding_mask=HIDDEN[hidden]), expected)


@pytest.mark.parametrize("hidden", ["left", "holes", "soft"])
def test_skip_padding_leaves_rows_that_are_no_padding_on_the_right(hidden):
    ours, _ = encoders()
    src = normal(B, S, E)
    expected = ours(src, src_key_padding_mask=HIDDEN[hidden])
    ours.skip_padding = True
    torch.testing.assert_close(in_every_mode(ours, src, src_key_padding_mask=HIDDEN[hidden]), expected)


@pytest.mark.parametrize("lengths", [(9, 0, 4), (0, 0, 0), (9, 9, 9)])
@pytest.mark.parametrize("form", [lambda mask: mask, as_float], ids=["bool", "float"])
def test_skip_padding_with_empty_sequences(lengths, form):
    ours, _ = encoders()
    src, hidden = normal(B, S, E), padding(*lengths, size=S)
    expected = ours(src, src_key_padding_mask=form(hidden))
    ours.skip_padding = True
    out = in_every_mode(ours, src, src_key_padding_mask=form(hidden))
    torch.testing.assert_close(out, expected.masked_fill(hidden[..., None], 0))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("lengths", [(9, 1, 4), (9, 9, 8)], ids=["worked_on_real_tokens", "worked_on_all"])
@pytest.mark.parametrize("mask", [None, causal(S), causal(S).flip(0, 1)], ids=["none", "causal", "pairs"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_skip_padding_zeroes_the_rows_of_any_encoder(norm_first, batch_first, mask, lengths):
    ours, theirs = encoders(norm_first=norm_first, batch_first=batch_first)
    src, hidden = normal(B, S, E), padding(*lengths, size=S)
    src = src if batch_first else src.transpose(0, 1).contiguous()
    with one_path_in_torch():
        expected = theirs(src, src_key_padding_mask=hidden, mask=mask)
    ours.skip_padding = True
    out = in_every_mode(ours, src, src_key_padding_mask=hidden, mask=mask)
    assert out.is_contiguous()
    ours.skip_padding = False
    torch.testing.assert_close(in_every_mode(ours, src, src_key_padding_mask=hidden, mask=mask), expected)
    rows = hidden if batch_first else hidden.T
    assert_equal(out[rows], torch.zeros(int(rows.sum()), E))
    torch.testing.assert_close(out[~rows], expected[~rows])


@pytest.mark.parametrize("masks", ["usual", "pairs", "none", "memory_hint"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_skip_padding_zeroes_the_rows_of_a_decoder(norm_first, batch_first, masks):
    ours, theirs = twins("decoder", norm_first=norm_first, batch_first=batch_first)
    tgt, memory = normal(B, L, E), normal(B, S, E)
    if not batch_first:
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    options = DECODER_MASKS[masks] | {"tgt_key_padding_mask": as_float(TARGET_PADDING)}
    if masks == "pairs":
        options["tgt_mask"] = as_float(torch.ones(L, L).tril(-3).bool())
    expected = theirs(tgt, memory, **options)
    torch.testing.assert_close(in_every_mode(ours, tgt, memory, **options), expected)
    ours.skip_padding = True
    out = in_every_mode(ours, tgt, memory, **options)
    rows = TARGET_PADDING if batch_first else TARGET_PADDING.T
    assert_equal(out[rows], torch.zeros(int(rows.sum()), E))
    torch.testing.assert_close(out[~rows], expected[~rows])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    "form", [lambda mask: mask, lambda mask: mask.clone(), as_float], ids=["same", "equal", "float"]
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_skips_padding_that_nobody_reads(monkeypatch, norm_first, batch_first, form):
    ours, theirs = twins("transformer", norm_first=norm_first, batch_first=batch_first)
    src, tgt = (normal(B, S, E), normal(B, L, E)) if batch_first else (normal(S, B, E), normal(L, B, E))
    options = {"src_key_padding_mask": form(SOURCE_PADDING), "memory_key_padding_mask": form(SOURCE_PADDING)}
    packings, look = [], packing.packing_if_worth_it

    def looking(*arguments):
        packings.append(look(*arguments))
        return packings[-1]

    monkeypatch.setattr(stacks, "packing_if_worth_it", looking)
    assert_same_as_torch(ours, theirs, {"src": src, "tgt": tgt}, **options)
    assert [p.shape for p in packings] == [(B, S)]
    packings.clear()
    for change in ({"memory_key_padding_mask": None}, {"memory_key_padding_mask": SOURCE_PADDING.flip(0)}):
        assert_same_as_torch(ours, theirs, {"src": src, "tgt": tgt}, **options | change)
    seen = []
    ours.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    ours(src, tgt, **options)
    torch.testing.assert_close(seen[0], ours.encoder(src, src_key_padding_mask=SOURCE_PADDING))
    assert packings == []


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_what_is_in_padding_reaches_no_real_token(value, skip):
    model, _ = twins("transformer", layers=1)
    model.encoder.skip_padding = model.decoder.skip_padding = skip
    masks = {
        "src_key_padding_mask": SOURCE_PADDING,
        "tgt_key_padding_mask": TARGET_PADDING,
        "memory_key_padding_mask": SOURCE_PADDING,
    }
    src, tgt = normal(B, S, E), normal(B, L, E)

    def run(filling):
        pairs = ((src, SOURCE_PADDING), (tgt, TARGET_PADDING))
        leaves = [torch.where(mask[..., None], filling, x).requires_grad_() for x, mask in pairs]
        out = model(*leaves, **masks, tgt_is_causal=True)[~TARGET_PADDING]
        if not skip:  # rows of padding are computed then, and 0 · NaN is in the weights' gradients
            return (out,)
        return out, *torch.autograd.grad(out.square().sum(), [*leaves, *model.parameters()])

    assert_equal(run(value), run(0.0))
