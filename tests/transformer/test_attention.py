"""MultiheadAttention equals torch.nn.MultiheadAttention from the same weights, with every mask and option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_transformer import MultiheadAttention
from tests.inputs import normal
from tests.oracle import assert_equal, assert_matches, in_float64, run_with_gradients
from tests.transformer.attention_cases import OPTIONS, B, E, H, L, S, as_float, bool_mask, inputs, padding, twins

MASKS = {
    "none": lambda heads: {},
    "padding_right": lambda heads: {"key_padding_mask": padding(9, 4, 1)},
    "padding_left": lambda heads: {"key_padding_mask": padding(9, 4, 1).flip(1)},
    "keys": lambda heads: {"key_padding_mask": bool_mask(B, S)},
    "keys_hard_float": lambda heads: {"key_padding_mask": as_float(padding(9, 4, 1))},
    "keys_float": lambda heads: {"key_padding_mask": normal(B, S)},
    "2d": lambda heads: {"attn_mask": bool_mask(L, S)},
    "2d_float": lambda heads: {"attn_mask": normal(L, S) + as_float(bool_mask(L, S))},
    "3d": lambda heads: {"attn_mask": bool_mask(B * heads, L, S)},
    "3d_float": lambda heads: {"attn_mask": normal(B * heads, L, S)},
    "padding_and_2d": lambda heads: {"key_padding_mask": padding(9, 4, 1), "attn_mask": bool_mask(L, S)},
    "keys_and_3d": lambda heads: {"key_padding_mask": bool_mask(B, S), "attn_mask": bool_mask(B * heads, L, S)},
    "float_and_float": lambda heads: {"key_padding_mask": normal(B, S), "attn_mask": normal(B * heads, L, S)},
    "bool_and_float": lambda heads: {"key_padding_mask": bool_mask(B, S), "attn_mask": normal(L, S)},
    "float_and_bool": lambda heads: {"key_padding_mask": normal(B, S), "attn_mask": bool_mask(L, S)},
    "causal": lambda heads: {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
    "causal_and_padding": lambda heads: {
        "attn_mask": torch.ones(L, S).triu(1).bool(),
        "key_padding_mask": padding(9, 4, 1),
        "is_causal": True,
    },
}


def results(module: nn.Module, tensors: dict, exact: bool = False, **options) -> dict[str, Tensor]:
    """Outputs and the gradients of everything: inputs, float masks, parameters."""

    def call(**leaves):
        names = dict(module.named_parameters())
        arguments = {name: x for name, x in leaves.items() if name not in names}
        if "key" not in arguments:
            arguments |= {"key": arguments["query"], "value": arguments["query"]}
        parameters = {name: leaves[name] for name in names}
        outputs = functional_call(module, parameters, kwargs=arguments | options)
        return {name: x for name, x in zip(("out", "weights"), outputs, strict=True) if x is not None}

    leaves = dict(module.named_parameters()) | tensors
    if exact:
        return run_with_gradients(call, in_float64(leaves), rounded_to=torch.float32)
    return run_with_gradients(call, leaves)


def assert_same_as_torch(ours, theirs, tensors: dict, torch_options: dict | None = None, **options) -> None:
    torch_options = options | (torch_options or {})
    exact = results(theirs, tensors, exact=True, **torch_options)
    naive = results(theirs, tensors, **torch_options)
    assert all(x.isfinite().all() for x in exact.values())
    assert_close_to_torch(results(ours, tensors, **options), exact, naive)


def assert_close_to_torch(got, exact, naive) -> None:
    """The oracle with room: torch keeps the weights, so its float32 backward rounds once less than one from lse."""
    assert_matches(got, exact, naive, factor=4, ulps=8)


EVERY_MASK = ("plain", "batch_first", "kdim_vdim", "bias_kv_zero_attn_kdim")
SOME_MASKS = ("none", "padding_right", "keys_and_3d", "causal")


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    ("options", "mask"),
    [(options, mask) for options in OPTIONS for mask in (MASKS if options in EVERY_MASK else SOME_MASKS)],
)
def test_cross_attention_equals_torch_forward_and_backward(options, mask):
    ours, theirs = twins(**OPTIONS[options])
    masks = MASKS[mask](ours.num_heads)
    causal = masks.pop("is_causal", False)
    tensors = inputs(ours) | masks
    # torch gets the mask alone: with the hint too, and need_weights=False, it would hide the added keys
    no_hint = {"is_causal": False}
    assert_same_as_torch(ours, theirs, tensors, no_hint, is_causal=causal)
    assert_same_as_torch(ours, theirs, tensors, no_hint, is_causal=causal, need_weights=False)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", ["plain", "batch_first", "no_bias", "bias_kv", "zero_attn", "head_width_1"])
def test_self_attention_equals_torch(options, average):
    ours, theirs = twins(**OPTIONS[options])
    tensors = inputs(ours, self_attention=True) | {"key_padding_mask": padding(7, 2, 5, size=L)}
    assert_same_as_torch(ours, theirs, tensors, average_attn_weights=average)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "2d", "3d"])
@pytest.mark.parametrize("options", ["plain", "batch_first", "kdim_vdim", "bias_kv_zero_attn_kdim"])
def test_unbatched_inputs_equal_torch(options, mask, average):
    ours, theirs = twins(**OPTIONS[options])
    tensors = {"query": normal(L, E), "key": normal(S, ours.kdim), "value": normal(S, ours.vdim)}
    tensors |= {
        "none": {},
        "padding": {"key_padding_mask": padding(4)[0]},
        "2d": {"attn_mask": bool_mask(L, S)},
        "3d": {"attn_mask": bool_mask(H, L, S)},
    }[mask]
    assert_same_as_torch(ours, theirs, tensors, average_attn_weights=average)


@pytest.mark.parametrize("options", ["batch_first", "bias_kv", "zero_attn"])
def test_is_causal_needs_no_mask(options):
    ours, theirs = twins(**OPTIONS[options])
    tensors = inputs(ours)
    mask = {"attn_mask": torch.ones(L, S).triu(1).bool()}
    assert_same_as_torch(ours, theirs, tensors, torch_options={"is_causal": False} | mask, is_causal=True)


@pytest.mark.parametrize("options", ["plain", "batch_first", "zero_attn"])
def test_key_lengths_are_padding_on_the_right(options):
    ours, theirs = twins(**OPTIONS[options])
    lengths = torch.tensor([9, 4, 1])
    tensors, mask = inputs(ours), padding(9, 4, 1)
    exact = results(theirs, tensors, exact=True, key_padding_mask=mask)
    naive = results(theirs, tensors, key_padding_mask=mask)
    assert_close_to_torch(results(ours, tensors, key_lengths=lengths), exact, naive)


def test_key_lengths_and_mask_combine():
    ours, _ = twins(batch_first=True)
    tensors, lengths, mask = inputs(ours), torch.tensor([9, 6, 4]), bool_mask(B, S)
    both = ours(**tensors, key_padding_mask=mask, key_lengths=lengths)
    merged = ours(**tensors, key_padding_mask=mask | padding(9, 6, 4))
    torch.testing.assert_close(both, merged)
    padded_twice = ours(**tensors, key_padding_mask=padding(5, 9, 4), key_lengths=lengths)
    assert_equal(padded_twice, ours(**tensors, key_padding_mask=padding(5, 6, 4)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", ["plain", "no_bias", "kdim_vdim"])
def test_packed_batches_equal_their_sequences_one_by_one(options, is_causal):
    ours, theirs = twins(**OPTIONS[options])
    lengths, key_lengths = (4, 1, 7), (2, 5, 3)
    tensors = {
        "query": normal(12, E),
        "key": normal(10, ours.kdim),
        "value": normal(10, ours.vdim),
    }
    offsets = {"q_offsets": torch.tensor([0, 4, 5, 12]), "k_offsets": torch.tensor([0, 2, 7, 10])}

    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = theirs

        def forward(self, query, key, value):
            sequences = zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True)
            outs = []
            for q, k, v in sequences:
                mask = torch.ones(len(q), len(k)).triu(1).bool() if is_causal else None
                outs.append(self.inner(q, k, v, attn_mask=mask, need_weights=False)[0])
            return torch.cat(outs), None

    exact, naive = (
        {name.replace("inner.", ""): x for name, x in results(OneByOne(), tensors, exact=exactly).items()}
        for exactly in (True, False)
    )
    got = results(ours, tensors, need_weights=False, is_causal=is_causal, **offsets)
    assert_close_to_torch(got, exact, naive)


def test_packed_batches_refuse_what_they_cannot_do():
    module, x, offsets = MultiheadAttention(E, H), normal(5, E), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="packed batches need q_offsets and need_weights=False"):
        module(x, x, x, q_offsets=offsets)
    with pytest.raises(ValueError, match="packed batches need q_offsets"):
        module(x, x, x, need_weights=False, k_offsets=offsets)
    with pytest.raises(ValueError, match="go with neither masks"):
        module(x, x, x, need_weights=False, q_offsets=offsets, attn_mask=bool_mask(5, 5))
    with pytest.raises(ValueError, match="packed query, key and value must be"):
        module(x[None], x, x, need_weights=False, q_offsets=offsets)
    with pytest.raises(ValueError, match="beyond the 5 packed tokens"):
        module(x, x, x, need_weights=False, q_offsets=offsets + torch.tensor([0, 0, 1]))
