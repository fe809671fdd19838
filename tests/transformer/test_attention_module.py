"""MultiheadAttention where it should do better than torch's, dropout, and that it is a module like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_transformer import MultiheadAttention
from tests.inputs import normal
from tests.oracle import assert_equal, assert_matches, in_float64
from tests.transformer.attention_cases import OPTIONS, B, E, H, L, S, as_float, bool_mask, inputs, padding, twins

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
        ({"attn_mask": bool_mask(1, B, H, L, S)}, "2-D or 3-D but found 5-D tensor"),
        ({"attn_mask": bool_mask(B, 2, L, S)}, r"4D attn_mask is .*, but should be \(3, 4, 7, 9\)"),
        ({"attn_mask": bool_mask(1, H, 1, S)}, r"but should be \(1, 4, 7, 9\)"),
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


def test_a_bool_and_a_float_mask_go_together_and_nothing_warns():
    module = MultiheadAttention(E, H, batch_first=True)  # torch says that it will stop taking both
    tensors, hidden, soft = inputs(module), bool_mask(B, S), normal(L, S)
    expected = module(**tensors, key_padding_mask=as_float(hidden), attn_mask=soft)
    torch.testing.assert_close(module(**tensors, key_padding_mask=hidden, attn_mask=soft), expected)


def test_wrong_sizes_of_the_constructor_are_torchs_errors():
    with pytest.raises(ValueError, match="embed_dim and num_heads must be greater than 0"):
        MultiheadAttention(0, 3)
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(10, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_with_masks_are_refused():
    module = MultiheadAttention(E, H, batch_first=True)
    nested = torch.nested.nested_tensor([normal(3, E), normal(5, E)])
    with pytest.raises(ValueError, match="nested tensors are supported where"):
        module(nested, nested, nested, key_padding_mask=bool_mask(2, 5))
    out, _ = module(nested, nested, nested, need_weights=False)
    for got, sequence in zip(out.unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(got, module(sequence, sequence, sequence)[0])
