"""MultiheadAttention equals torch.nn.MultiheadAttention from the same weights, except where that gives NaN."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_transformer import MultiheadAttention
from tests.inputs import normal
from tests.oracle import assert_equal, assert_matches, in_float64, run_with_gradients

B, H, L, S, E = 3, 4, 7, 9, 24

OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 10, "vdim": 17, "batch_first": True},
    "vdim_no_bias": {"vdim": 5, "bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_zero_attn_kdim": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 6},
    "head_width_1": {"num_heads": E},
}


def bool_mask(*shape: int) -> Tensor:
    """Random; key 0 is kept, so that no row is masked whole (torch's result would be NaN)."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def padding(*lengths: int, size: int = S) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


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


def twins(num_heads: int = H, embed_dim: int = E, **options) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same random weights (biases too)."""
    ours, theirs = (kind(embed_dim, num_heads, **options) for kind in (MultiheadAttention, nn.MultiheadAttention))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(module: nn.MultiheadAttention, *, self_attention: bool = False) -> dict[str, Tensor]:
    if self_attention:
        return {"query": normal(B, L, E) if module.batch_first else normal(L, B, E)}
    widths = {"query": (L, E), "key": (S, module.kdim), "value": (S, module.vdim)}
    return {
        name: normal(B, length, width) if module.batch_first else normal(length, B, width)
        for name, (length, width) in widths.items()
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


# ------------------------------------------------------------------ better than torch: masked rows, NaN, the fast path


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_fully_masked_row_gives_the_output_bias(need_weights, training):
    module, _ = twins(batch_first=True)
    module.train(training)
    x = normal(B, L, E).requires_grad_()
    hidden = torch.zeros(B, L, dtype=torch.bool)
    hidden[1] = True
    out, weights = module(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    assert_equal(out[1], module.out_proj.bias.expand(L, E))
    if need_weights:
        assert_equal(weights[1], torch.zeros(L, L))
    out.square().sum().backward()
    assert_equal(x.grad[1], torch.zeros(L, E))
    for parameter in module.parameters():
        assert parameter.grad.isfinite().all()
    alone, _ = module(x[:1], x[:1], x[:1])
    torch.testing.assert_close(out[:1], alone)


@pytest.mark.parametrize("form", ["key_padding_mask", "float", "key_lengths", "attn_mask"])
def test_nan_in_a_masked_key_reaches_nothing(form):
    module, _ = twins(batch_first=True)
    query, key = normal(B, L, E), normal(B, S, E)
    hidden = padding(9, 4, 1)
    poisoned = torch.where(hidden[..., None], torch.nan, key)
    masks = {
        "key_padding_mask": {"key_padding_mask": hidden},
        "float": {"key_padding_mask": as_float(hidden)},
        "key_lengths": {"key_lengths": torch.tensor([9, 4, 1])},
        "attn_mask": {"attn_mask": hidden[:, None, None, :].expand(B, H, L, S).reshape(B * H, L, S)},
    }[form]
    query.requires_grad_()
    clean = module(query, key, key, **masks)
    (clean_gradient,) = torch.autograd.grad(clean[0].sum(), query)
    got = module(query, poisoned, poisoned, **masks)
    (gradient,) = torch.autograd.grad(got[0].sum(), query)
    assert_equal(got, clean)
    assert_equal(gradient, clean_gradient)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
@pytest.mark.parametrize("stack", [False, True])
def test_inside_torch_layers_it_is_called_in_every_mode(mode, stack):
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if stack else layer
    expected_model = copy.deepcopy(model)
    calls = []
    for one in model.layers if stack else [model]:
        ours = MultiheadAttention(E, H, dropout=0.1, batch_first=True)
        ours.load_state_dict(one.self_attn.state_dict())
        one.self_attn = ours
        ours.register_forward_hook(lambda *_: calls.append(1))
    x, hidden = normal(B, L, E), padding(7, 2, 5, size=L)
    if mode == "train":
        model(x, src_key_padding_mask=hidden)
    else:
        model.eval(), expected_model.eval()
        context = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
        with context():
            got = model(x, src_key_padding_mask=hidden)
        expected = expected_model(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(got[~hidden], expected[~hidden])
    assert len(calls) == (2 if stack else 1)


def test_a_causal_mask_from_torch_layers_is_honoured():
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    swapped = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        ours = MultiheadAttention(E, H, batch_first=True)
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(swapped, name, ours)
    x, memory = normal(B, L, E), normal(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": padding(9, 4, 1), "tgt_is_causal": True}
    torch.testing.assert_close(swapped(x, memory, **masks), layer(x, memory, **masks))


def test_train_eval_and_no_grad_give_the_same_bits():
    module, _ = twins(batch_first=True)
    tensors = inputs(module) | {"attn_mask": normal(L, S), "key_padding_mask": normal(B, S)}
    expected = module.train()(**tensors)
    assert_equal(module.eval()(**tensors), expected)
    with torch.no_grad():
        assert_equal(module(**tensors), expected)
        assert_equal(module(**tensors, need_weights=False)[0], expected[0])


def test_out_proj_is_called_as_a_module():
    module, _ = twins(batch_first=True)
    x, seen = normal(B, L, E), []
    module.out_proj.register_forward_hook(lambda _module, _args, out: seen.append(out) or out + 1)
    out, _ = module(x, x, x)
    assert_equal(out, seen[0] + 1)


# ------------------------------------------------------------------ dropout


def test_dropout_drops_the_weights_it_returns():
    module, _ = twins(batch_first=True, dropout=0.5)
    query, key = normal(8, 30, E), normal(8, 40, E)
    out, weights = module(query, key, key, average_attn_weights=False)
    heads = weights @ module.project_keys(key, key)[1]
    torch.testing.assert_close(out, module.merge(heads))
    dropped = (weights == 0).double().mean()
    assert abs(dropped - 0.5) < 0.02  # 38,400 draws: 8 standard deviations
    undropped = module.eval()(query, key, key, average_attn_weights=False)[1]
    kept = weights != 0
    torch.testing.assert_close(weights[kept], 2 * undropped[kept])


def test_dropout_follows_torchs_generator():
    module, _ = twins(batch_first=True, dropout=0.5)
    x = normal(B, L, E)

    def run(seed, **options):
        torch.manual_seed(seed)
        return module(x, x, x, **options)[0]

    assert_equal(run(3), run(3))
    assert_equal(run(3), run(3, need_weights=False))
    assert not torch.equal(run(3), run(4))
    torch.manual_seed(3)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])


# ------------------------------------------------------------------ a good citizen: weights, copies, dtypes, compile


@pytest.mark.parametrize("options", OPTIONS)
def test_initial_weights_and_state_dict_are_torchs(options):
    arguments = {"embed_dim": E, "num_heads": H} | OPTIONS[options]
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(**arguments)
    torch.manual_seed(5)
    ours = MultiheadAttention(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal(ours.state_dict(), theirs.state_dict())
    nn.init.normal_(ours.out_proj.weight)
    theirs.load_state_dict(ours.state_dict())
    assert_equal(theirs.state_dict(), ours.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_work_and_keep_off_the_fast_path(duplicate):
    module, _ = twins(batch_first=True)
    twin = duplicate(module)
    x = normal(B, L, E)
    assert_equal(twin(x, x, x), module(x, x, x))
    assert len(twin._forward_pre_hooks) == 1
    nn.init.zeros_(twin.out_proj.weight)
    assert not torch.equal(twin(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module, theirs = twins(batch_first=True, add_bias_kv=True)
    tensors = inputs(module)
    masks = {"key_padding_mask": padding(9, 4, 1)}
    with torch.no_grad():
        exact = theirs.double()(**in_float64(tensors), **masks)
    halves = {name: x.to(dtype) for name, x in tensors.items()}
    with torch.no_grad():
        got = module.to(dtype)(**halves, **masks)
        naive = theirs.to(dtype)(**halves, **masks)
    assert_matches(got, exact, naive, ulps=4)


def test_autocast():
    module, theirs = twins(batch_first=True, add_bias_kv=True)
    tensors = inputs(module) | {"key_padding_mask": padding(9, 4, 1)}
    exact = theirs.double()(**in_float64(tensors))
    with torch.autocast("cpu", torch.bfloat16):
        got, naive = module(**tensors), theirs.float()(**tensors)
    assert got[0].dtype == naive[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0].double(), exact[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_sequences(batch_first):
    ours, _ = twins(batch_first=batch_first)
    axes = (lambda *shape: shape) if batch_first else (lambda n, length, width: (length, n, width))
    query, key = normal(*axes(B, L, E)), normal(*axes(B, 0, E))
    out, weights = ours(query, key, key)  # nothing to attend to
    assert_equal(out, ours.out_proj.bias.expand(out.shape))
    assert weights.shape == (B, L, 0)
    none = normal(*axes(0, L, E))
    assert ours(none, none, none)[0].shape == none.shape


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at all locals
def test_compiled_equals_eager():
    module, _ = twins(batch_first=True)
    tensors = inputs(module) | {"key_padding_mask": padding(9, 4, 1)}
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(**tensors), module(**tensors))


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("error", [ValueError, AssertionError, RuntimeError])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": normal(E)}, "query should be unbatched 2D or batched 3D tensor but received 1-D query tensor"),
        ({"key": normal(S, E)}, "expected `key` and `value` to be 3-D but found 2-D and 3-D tensors respectively"),
        ({"query": normal(B, L, E + 1)}, "was expecting embedding dimension of 24, but got 25"),
        ({"key": normal(B, S, 3)}, "key: was expecting embedding dimension of 24, but got 3"),
        ({"key": normal(B, S + 1, E)}, "key shape .* does not match value shape"),
        ({"query": normal(B + 1, L, E)}, "must have the same batch size, got 4 and 3"),
        ({"key_padding_mask": bool_mask(S)}, "expected `key_padding_mask` to be `None` or 2-D but found 1-D"),
        ({"key_padding_mask": bool_mask(B, S + 1)}, r"Expected key_padded_mask.shape\[1\] to be 9, but got 10"),
        ({"key_padding_mask": bool_mask(B + 1, S)}, r"has shape \(4, 9\)"),
        ({"key_padding_mask": torch.zeros(B, S, dtype=torch.uint8)}, "only bool and floating types of key_padding"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "only bool and floating types of attn_mask"),
        ({"attn_mask": bool_mask(S)}, "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D tensor"),
        ({"attn_mask": bool_mask(B, H, L, S)}, "2-D or 3-D but found 4-D tensor"),
        ({"attn_mask": bool_mask(S, L)}, "The shape of the 2D attn_mask is .*, but should be"),
        ({"attn_mask": bool_mask(H, L, S)}, r"Expected `attn_mask` shape to be \(12, 7, 9\)"),
    ],
)
def test_what_does_not_fit_is_an_error_in_torchs_words(changes, message, error):
    module = MultiheadAttention(E, H, batch_first=True)
    arguments = inputs(module) | changes
    with pytest.raises(error, match=message):
        module(**arguments)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([9, 4], "k_lengths must have shape"), ([9, 4, 10], "between 0 and 9"), ([9.0, 4.0, 1.0], "must be integers")],
)
def test_wrong_key_lengths_are_errors(lengths, message):
    module = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(ValueError, match=message):
        module(**inputs(module), key_lengths=torch.tensor(lengths))


def test_key_lengths_of_unbatched_inputs_are_an_error():
    module = MultiheadAttention(E, H)
    x = normal(L, E)
    with pytest.raises(ValueError, match="key_lengths needs a batched query"):
        module(x, x, x, key_lengths=torch.tensor([3]))


def test_mismatched_masks_warn_as_torch_does():
    module = MultiheadAttention(E, H, batch_first=True)
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
        module(**inputs(module), key_padding_mask=bool_mask(B, S), attn_mask=normal(L, S))


def test_wrong_sizes_of_the_constructor_are_torchs_errors():
    with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
        MultiheadAttention(0, 3)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(10, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_with_masks_are_refused():
    module = MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([normal(3, E), normal(5, E)])
    with pytest.raises(ValueError, match="nested tensors are supported for self-attention"):
        module(nested, nested, nested, key_padding_mask=bool_mask(2, 5))
    out, _ = module(nested, nested, nested, need_weights=False)
    for got, sequence in zip(out.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(got, module(sequence, sequence, sequence)[0])
