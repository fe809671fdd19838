"""What PyTorch's test/nn/test_multihead_attention.py asks of nn.MultiheadAttention, in our words; nested tensors; masks
of each head. (test_torch_files.py lists what is waived.)"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fused_transformer import MultiheadAttention
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.attention_cases import OPTIONS, B, E, H, L, S, as_float, bool_mask, inputs, padding, twins

NO_GRAD_EVAL = (True, False)  # where torch has a path of its own for inference, and where it has none


def prepared(module: nn.Module, inference: bool) -> torch.autograd.grad_mode.set_grad_enabled:
    module.train(not inference)
    return torch.set_grad_enabled(not inference)


# ------------------------------------------------------------------ dtypes, missing weights and biases


@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
@pytest.mark.parametrize("options", ["batch_first", "kdim_vdim", "bias_kv"])
def test_a_bias_of_another_dtype_than_the_query(options, inference):
    module, _ = twins(**OPTIONS[options])
    module.double()
    tensors = {name: x.double() for name, x in inputs(module).items()}
    if options == "batch_first":
        tensors = dict.fromkeys(tensors, tensors["query"])
    rounded = module.in_proj_bias.detach().half()
    module.in_proj_bias = nn.Parameter(rounded.double())
    expected = module(**tensors)
    module.in_proj_bias = nn.Parameter(rounded)
    with prepared(module, inference):
        got = module(**tensors)
    torch.testing.assert_close(got, expected)
    if not inference:
        got[0].sum().backward()
        assert module.in_proj_bias.grad.dtype == torch.float16


@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 2, "vdim": 2}, {"kdim": 2, "vdim": 2, "bias": False}])
def test_without_in_proj_weight_or_bias(options, dtype, inference):
    ours, theirs = (kind(4, 4, dtype=dtype, **options) for kind in (MultiheadAttention, nn.MultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    assert (ours.in_proj_weight is None) == ("kdim" in options) and (ours.in_proj_bias is None) == ("bias" in options)
    query = torch.rand(4, 4, 4, dtype=dtype)
    key = torch.rand(4, 4, 2, dtype=dtype) if "kdim" in options else query
    with prepared(ours, inference):
        torch.testing.assert_close(ours(query, key, key), theirs(query, key, key))


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
@pytest.mark.parametrize("soft", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize(
    "forms", [("attn_mask",), ("key_padding_mask",), ("attn_mask", "key_padding_mask")], ids="+".join
)
@pytest.mark.parametrize("per_head", [False, True])
def test_one_mask_and_two_at_once(forms, soft, per_head, inference):
    ours, theirs = twins(batch_first=True)
    x = normal(B, L, E)
    masks = {
        "attn_mask": bool_mask(B * H, L, L) if per_head else bool_mask(L, L),
        "key_padding_mask": padding(7, 3, 5, size=L),
    }
    masks = {name: as_float(mask) if soft else mask for name, mask in masks.items() if name in forms}
    expected = theirs(x, x, x, **masks, average_attn_weights=False)
    with prepared(ours, inference):
        torch.testing.assert_close(ours(x, x, x, **masks, average_attn_weights=False), expected)


def test_a_mask_of_each_head_is_what_that_head_sees():
    module, _ = twins(batch_first=True)
    tensors, mask = inputs(module), bool_mask(B, H, L, S)
    _, weights = module(**tensors, attn_mask=mask.view(B * H, L, S), average_attn_weights=False)
    assert_equal(weights == 0, mask)
    for head in range(H):
        for sequence in range(B):
            alone = {name: x[sequence] for name, x in tensors.items()}
            _, expected = module(**alone, attn_mask=mask[sequence, head], average_attn_weights=False)
            torch.testing.assert_close(weights[sequence, head], expected[head])


@pytest.mark.parametrize("options", ["batch_first", "plain", "bias_kv_zero_attn_kdim"])
@pytest.mark.parametrize(("batch", "heads"), [*itertools.product([1, B], [1, H])])
@pytest.mark.parametrize("soft", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_of_four_axes_broadcast(options, batch, heads, soft, padded):
    module, theirs = twins(**OPTIONS[options])
    tensors = inputs(module)
    mask = normal(batch, heads, L, S).requires_grad_() if soft else bool_mask(batch, heads, L, S)
    hidden = padding(9, 4, 1) if padded else None
    if soft and padded:
        hidden = as_float(hidden)
    got = module(**tensors, attn_mask=mask, key_padding_mask=hidden)
    expected = theirs(**tensors, attn_mask=mask.expand(B, H, L, S).reshape(-1, L, S), key_padding_mask=hidden)
    torch.testing.assert_close(got, expected)
    if soft:
        upstream = normal(*got[0].shape)
        gradients = [torch.autograd.grad(out, mask, upstream)[0] for out in (got[0], expected[0])]
        torch.testing.assert_close(*gradients)


def test_masks_of_four_axes_without_a_batch():
    module, theirs = twins()
    query, key, mask = normal(L, E), normal(S, E), bool_mask(1, H, L, S)
    torch.testing.assert_close(module(query, key, key, attn_mask=mask), theirs(query, key, key, attn_mask=mask[0]))
    with pytest.raises(ValueError, match=r"should be \(1, 4, 7, 9\)"):
        module(query, key, key, attn_mask=mask.expand(2, -1, -1, -1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at all locals
def test_a_mask_does_not_break_the_graph_in_eval():
    torch._dynamo.reset()
    module = MultiheadAttention(E, H, batch_first=True).eval()
    x, mask = normal(B, L, E), bool_mask(L, L)
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, x, x, attn_mask=mask), module(x, x, x, attn_mask=mask))


# ------------------------------------------------------------------ shapes that do not fit, in torch's words

x3, x2, x1, m = torch.randn(4, 4, 4), torch.randn(4, 4), torch.randn(4), torch.zeros(4, 4, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("arguments", "masks", "message"),
    [
        ((x3, x2, x3), {}, "expected `key` and `value` to be 3-D but found 2-D and 3-D tensors respectively"),
        ((x3, x3, x2), {}, "expected `key` and `value` to be 3-D but found 3-D and 2-D tensors respectively"),
        ((x3, x2, x2), {}, "expected `key` and `value` to be 3-D but found 2-D and 2-D tensors respectively"),
        ((x2, x3, x2), {}, "expected `key` and `value` to be 2-D but found 3-D and 2-D tensors respectively"),
        ((x2, x2, x3), {}, "expected `key` and `value` to be 2-D but found 2-D and 3-D tensors respectively"),
        ((x1, x1, x1), {}, "query should be unbatched 2D or batched 3D tensor but received 1-D query tensor"),
        ((x3, x3, x3), {"key_padding_mask": m[0, 0, 0]}, "`key_padding_mask` to be `None` or 2-D but found 1-D"),
        ((x2, x2, x2), {"key_padding_mask": m[0, 0]}, "`key_padding_mask` to be `None` or 1-D but found 2-D"),
        ((x3, x3, x3), {"attn_mask": m[0, 0, 0]}, "`attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor instead"),
        ((x2, x2, x2), {"attn_mask": m[0, 0, 0]}, "`attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor instead"),
        ((x2, x2, x2), {"attn_mask": m.view(16, 4, 4)[:5]}, r"Expected `attn_mask` shape to be \(4, 4, 4\)"),
        ((x3, x3, x3), {"attn_mask": m[0]}, r"Expected `attn_mask` shape to be \(16, 4, 4\)"),
        ((x3, x3, x3), {"attn_mask": m[0, 0, :3]}, r"The shape of the 2D attn_mask is .*, but should be \(4, 4\)"),
        ((x3, x3, x3), {"key_padding_mask": m[0, 0, :, :3]}, r"Expected key_padded_mask.shape\[1\] to be 4, but got 3"),
    ],
)
def test_shape_errors_are_torchs(arguments, masks, message, batch_first, inference):
    module = MultiheadAttention(4, 4, batch_first=batch_first)
    with prepared(module, inference), pytest.raises(AssertionError, match=message):
        module(*arguments, **masks)


# ------------------------------------------------------------------ nested tensors

LENGTHS = ((3, 5, 1), (4, 1, 6))  # of the queries and of the keys
PROTOTYPE = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])


def sequences(width: int, lengths: tuple[int, ...]) -> list[Tensor]:
    return [normal(length, width).requires_grad_() for length in lengths]


def nested(parts: list[Tensor], layout: torch.layout) -> Tensor:
    """With the gradients of `parts`."""
    return torch.nested.as_nested_tensor(parts, layout=layout)


@PROTOTYPE
@LAYOUTS
@pytest.mark.parametrize("options", ["batch_first", "no_bias", "kdim_vdim", "bias_kv", "zero_attn"])
@pytest.mark.parametrize("weights", ["averaged", "of_each_head", "none"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nested_tensors_are_sequences_by_themselves(layout, options, weights, is_causal):
    module, theirs = twins(**OPTIONS[options] | {"batch_first": True})
    queries, keys, values = (
        sequences(width, lengths)
        for width, lengths in ((E, LENGTHS[0]), (module.kdim, LENGTHS[1]), (module.vdim, LENGTHS[1]))
    )
    wanted = {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    out, found = module(*(nested(x, layout) for x in (queries, keys, values)), is_causal=is_causal, **wanted)
    assert out.is_nested and out.layout == layout
    got = out.unbind()
    expected, gradients = [], []
    upstream = [normal(len(x), E) for x in queries]
    for index, parts in enumerate(zip(queries, keys, values, strict=True)):
        length, size = len(parts[0]), len(parts[1])
        mask = torch.ones(length, size, dtype=torch.bool).triu(1) if is_causal else None
        alone, alone_weights = theirs(*parts, attn_mask=mask, **wanted)
        expected.append(alone)
        if alone_weights is not None:
            row, added = found[index], alone_weights.shape[-1] - size
            longest = row.shape[-1] - added
            real = torch.cat([row[..., :size], row[..., longest:]], -1)
            torch.testing.assert_close(real[..., :length, :], alone_weights)
            assert not row[..., length:, :].any() and not row[..., size:longest].any()
    torch.testing.assert_close(list(got), expected)
    inputs = [*queries, *keys, *values]
    gradients = [torch.autograd.grad(x, inputs, upstream) for x in (list(got), expected)]
    torch.testing.assert_close(*gradients)


@PROTOTYPE
@LAYOUTS
@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
def test_nested_self_attention(layout, inference):
    module, theirs = twins(batch_first=True)
    parts = sequences(E, LENGTHS[0])
    x = nested(parts, layout)
    with prepared(module, inference):
        for need_weights in (True, False):
            out, _ = module(x, x, x, need_weights=need_weights)
            torch.testing.assert_close(list(out.unbind()), [theirs(part, part, part)[0] for part in parts])
            if layout == torch.jagged:
                assert_equal(out.offsets(), x.offsets())
                assert (out + x).is_nested  # what a residual connection needs: both have the same lengths to torch


@PROTOTYPE
@pytest.mark.parametrize("inference", NO_GRAD_EVAL)
def test_an_empty_nested_tensor_has_too_few_axes(inference):
    module, empty = MultiheadAttention(4, 4, batch_first=True), torch.nested.nested_tensor([])
    message = "query should be unbatched 2D or batched 3D tensor but received 1-D query tensor"
    with prepared(module, inference), pytest.raises(AssertionError, match=message):
        module(empty, empty, empty)


@PROTOTYPE
@LAYOUTS
def test_nested_tensors_that_do_not_fit_are_errors(layout):
    module = MultiheadAttention(E, H, batch_first=True)
    query, key = (nested(sequences(E, lengths), layout) for lengths in LENGTHS)
    other = torch.jagged if layout == torch.strided else torch.strided
    supported = "nested tensors are supported where"
    for arguments, masks, message in [
        ((query, key, key), {"key_padding_mask": bool_mask(3, 6)}, supported),
        ((query, key, key), {"attn_mask": bool_mask(5, 6)}, supported),
        ((query, key, key), {"key_lengths": torch.tensor([4, 1, 6])}, supported),
        ((query, normal(3, 6, E), normal(3, 6, E)), {}, supported),
        ((normal(3, 6, E), key, key), {}, supported),
        ((query, key, nested(sequences(E, LENGTHS[1]), other)), {}, supported),
        ((query, key, nested(sequences(E, (1, 4, 6)), layout)), {}, "sequences of the same lengths"),
        ((query, *[nested(sequences(E, (4, 1)), layout)] * 2), {}, "the same number of sequences"),
        ((query, key, nested(sequences(E - 1, LENGTHS[1]), layout)), {}, "was expecting embedding dimension of 24"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(*arguments, **masks)
    with pytest.raises(ValueError, match=supported):
        MultiheadAttention(E, H)(query, query, query)
