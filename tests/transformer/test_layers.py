"""Encoder and decoder layers against torch.nn's from the same weights, and the parts they are made of."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fused_transformer import AddLayerNorm, Decoder, DecoderLayer, Encoder, EncoderLayer, FeedForward, TokenEmbedding
from fused_transformer.packing import Packing
from tests.inputs import normal
from tests.oracle import assert_equal, assert_matches, in_float64, run_with_gradients

B, L, S, E, H, WIDE = 3, 7, 9, 24, 4, 40
SIZES = {"d_model": E, "num_heads": H, "d_feedforward": WIDE}
LENGTHS = torch.tensor([7, 2, 5])
REAL = torch.arange(L) < LENGTHS[:, None]
KINDS = {"encoder": EncoderLayer, "decoder": DecoderLayer}


def padding(*lengths: int, size: int) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def twins(kind: str, dropout: float = 0.0, **options):
    """Our layer and torch.nn's, with the same random weights (norms and biases too)."""
    their_kind = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[kind]
    theirs = their_kind(E, H, WIDE, dropout, batch_first=True, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = KINDS[kind](**SIZES, dropout=dropout, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def results(layer: nn.Module, tensors: dict[str, Tensor], real, exact: bool = False, **options) -> dict[str, Tensor]:
    """The output at real tokens and the gradients of inputs and parameters, under torch.nn's names."""
    names = dict(layer.named_parameters())

    def call(**leaves):
        arguments = [leaves[name] for name in tensors]
        parameters = {name: leaves[name] for name in names}
        return functional_call(layer, parameters, tuple(arguments), options)[real]

    leaves = names | tensors
    if exact:
        out = run_with_gradients(call, in_float64(leaves), rounded_to=torch.float32)
    else:
        out = run_with_gradients(call, leaves)
    return {name.replace("feed_forward.", ""): x for name, x in out.items()}


def assert_same_as_torch(ours, theirs, tensors, our_options: dict, their_options: dict) -> None:
    real = REAL if "lengths" in our_options else ...
    exact = results(theirs, tensors, real, exact=True, **their_options)
    naive = results(theirs, tensors, real, **their_options)
    # room as in test_attention.py; the LayerNorms pass it on
    assert_matches(results(ours, tensors, real, **our_options), exact, naive, factor=4, ulps=8)


OPTIONS = {
    "post_norm": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "eps": {"layer_norm_eps": 0.1, "norm_first": True},
    "no_bias": {"bias": False},
}
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
ENCODER_MASKS = {
    "none": ({}, {}),
    "lengths": ({"lengths": LENGTHS}, {"src_key_padding_mask": padding(7, 2, 5, size=L)}),
    "keys": (
        {"key_padding_mask": padding(7, 2, 5, size=L).flip(1)},
        {"src_key_padding_mask": padding(7, 2, 5, size=L).flip(1)},
    ),
    "causal": ({"is_causal": True}, {"src_mask": CAUSAL}),
    "causal_and_lengths": (
        {"is_causal": True, "lengths": LENGTHS},
        {"src_mask": CAUSAL, "src_key_padding_mask": padding(7, 2, 5, size=L)},
    ),
    "pairs": ({"attn_mask": CAUSAL.flip(0, 1)}, {"src_mask": CAUSAL.flip(0, 1)}),
}


@pytest.mark.parametrize("mask", ENCODER_MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_encoder_layer_equals_torch_forward_and_backward(options, mask):
    ours, theirs = twins("encoder", **OPTIONS[options])
    assert_same_as_torch(ours, theirs, {"x": normal(B, L, E)}, *ENCODER_MASKS[mask])


DECODER_MASKS = {
    "causal": ({}, {"tgt_mask": CAUSAL}),
    "not_causal": ({"is_causal": False}, {}),
    "lengths": (
        {"lengths": LENGTHS, "memory_lengths": torch.tensor([9, 1, 4])},
        {
            "tgt_mask": CAUSAL,
            "tgt_key_padding_mask": padding(7, 2, 5, size=L),
            "memory_key_padding_mask": padding(9, 1, 4, size=S),
        },
    ),
    "masks": (
        {
            "is_causal": False,
            "attn_mask": CAUSAL.flip(0, 1),
            "memory_attn_mask": padding(1, 2, 3, 4, 5, 6, 7, size=S),
            "memory_key_padding_mask": padding(9, 8, 4, size=S),
        },
        {
            "tgt_mask": CAUSAL.flip(0, 1),
            "memory_mask": padding(1, 2, 3, 4, 5, 6, 7, size=S),
            "memory_key_padding_mask": padding(9, 8, 4, size=S),
        },
    ),
}


@pytest.mark.parametrize("mask", DECODER_MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_decoder_layer_equals_torch_forward_and_backward(options, mask):
    ours, theirs = twins("decoder", **OPTIONS[options])
    tensors = {"x": normal(B, L, E), "memory": normal(B, S, E)}
    assert_same_as_torch(ours, theirs, tensors, *DECODER_MASKS[mask])


@pytest.mark.parametrize("kind", KINDS)
def test_a_chained_stack_equals_its_layers_one_by_one(kind):
    layers = [KINDS[kind](**SIZES, norm_first=True) for _ in range(3)]
    for layer in layers:
        layer.eval()
    x, memory = normal(B, L, E), [normal(B, S, E)] * (kind == "decoder")
    expected = x
    for layer in layers:
        expected = layer(expected, *memory)
    branch, residual = x, None
    for layer in layers:
        branch, residual = layer(branch, *memory, residual=residual, chained=True)
    torch.testing.assert_close(residual + branch, expected)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
def test_stacks_equal_torchs(norm_first, padded):
    layers = {
        "encoder": nn.TransformerEncoderLayer(E, H, WIDE, 0.0, batch_first=True, norm_first=norm_first),
        "decoder": nn.TransformerDecoderLayer(E, H, WIDE, 0.0, batch_first=True, norm_first=norm_first),
    }
    norms = [nn.LayerNorm(E) if norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(layers["encoder"], 2, norms[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(layers["decoder"], 2, norms[1])
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.2)
    options = SIZES | {"norm_first": norm_first, "dropout": 0.0}
    ours = Encoder(2, **options), Decoder(2, **options)
    ours[0].load_state_dict(encoder.state_dict())
    ours[1].load_state_dict(decoder.state_dict())
    x, target, hidden = normal(B, S, E), normal(B, L, E), padding(9, 1, 4, size=S)
    lengths = torch.tensor([9, 1, 4]) if padded else None
    mask = hidden if padded else None
    expected = encoder(x, src_key_padding_mask=mask)
    memory = ours[0](x, lengths)
    real = ~hidden if padded else ...
    torch.testing.assert_close(memory[real], expected[real])
    expected = decoder(target, expected, tgt_mask=CAUSAL, memory_key_padding_mask=mask)
    torch.testing.assert_close(ours[1](target, memory, memory_lengths=lengths), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_batches_equal_padded_ones(kind, norm_first):
    layer = KINDS[kind](**SIZES, norm_first=norm_first, dropout=0.0)
    x, memory, memory_lengths = normal(B, L, E), normal(B, S, E), torch.tensor([9, 1, 4])
    packing, of_memory = Packing.of(LENGTHS, (B, L)), Packing.of(memory_lengths, (B, S))
    if kind == "encoder":
        # chained, the layer leaves packing to the stack
        padded = layer(x, LENGTHS, chained=True)
        alone, packed = layer(x, LENGTHS), layer(packing.pack(x), offsets=packing.offsets)
    else:
        padded = layer(x, memory, LENGTHS, memory_lengths, chained=True)
        alone = layer(x, memory, LENGTHS, memory_lengths)
        offsets = {"offsets": packing.offsets, "memory_offsets": of_memory.offsets}
        packed = layer(packing.pack(x), of_memory.pack(memory), **offsets)
    padded = padded[0] + padded[1] if norm_first else padded[0]
    torch.testing.assert_close(packed, packing.pack(padded))
    assert_equal(alone, packing.unpack(packed))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_padding_reaches_no_real_token(kind, norm_first):
    layer = KINDS[kind](**SIZES, norm_first=norm_first, dropout=0.0)
    x, memory, hidden = normal(B, L, E), normal(B, S, E), padding(7, 2, 5, size=L)
    memory_hidden, memory_lengths = padding(9, 1, 4, size=S), torch.tensor([9, 1, 4])

    def run(value):
        more = ()
        if kind == "decoder":
            more = (torch.where(memory_hidden[..., None], value, memory),)
        lengths = (LENGTHS, memory_lengths)[: 1 + len(more)]
        return layer(torch.where(hidden[..., None], value, x), *more, *lengths)[~hidden]

    assert_equal(run(torch.nan), run(0.0))
    assert_equal(run(1e30), run(0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_agree_without_dropout_and_differ_with_it(kind):
    arguments = [normal(B, L, E)] + [normal(B, S, E)] * (kind == "decoder")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        layer = KINDS[kind](**SIZES, **rates)
        expected = layer.eval()(*arguments)
        assert_equal(layer.train()(*arguments), expected)
        with torch.no_grad():
            assert_equal(layer.eval()(*arguments), expected)
        dropping = KINDS[kind](**SIZES, **rates | {name: 0.5})
        dropping.load_state_dict(layer.state_dict())
        assert_equal(dropping.eval()(*arguments), expected)
        assert not torch.allclose(dropping.train()(*arguments), expected)


def test_dropout_of_the_residual_sum():
    norm = AddLayerNorm(E, dropout=0.3)
    x, residual = normal(60, 40, E), normal(60, 40, E)
    y, total = norm.with_total(x, residual)
    torch.testing.assert_close(y, F.layer_norm(total, (E,)))
    added = total - residual
    dropped = added.abs() < 1e-6
    assert abs(dropped.double().mean() - 0.3) < 0.01  # 57,600 draws: 5 standard deviations
    torch.testing.assert_close(added[~dropped], x[~dropped] / 0.7, atol=1e-5, rtol=1e-4)
    torch.manual_seed(1)
    first = norm(x, residual)
    torch.manual_seed(1)
    assert_equal(norm.with_total(x, residual)[0], first)
    assert_equal(norm.eval().with_total(x, residual)[1], residual + x)


def test_a_pre_norm_layer_alone_drops_its_last_sublayer_too():
    layer = EncoderLayer(**SIZES, dropout=0.3, norm_first=True)
    for name, parameter in layer.named_parameters():
        if "norm" not in name:
            nn.init.zeros_(parameter)
    nn.init.ones_(layer.feed_forward.linear2.bias)  # so that only dropout(1) is added to x
    x = normal(60, 40, E)
    added = layer(x) - x
    dropped = added.abs() < 1e-6
    assert abs(dropped.double().mean() - 0.3) < 0.01
    torch.testing.assert_close(added[~dropped], torch.full_like(added[~dropped], 1 / 0.7))


# ------------------------------------------------------------------ the parts


@pytest.mark.parametrize("bias", [True, False])
def test_add_layer_norm_is_layer_norm_of_the_sum(bias):
    norm = AddLayerNorm(E, bias=bias, eps=1e-3)
    nn.init.normal_(norm.weight)
    x, residual = normal(B, L, E), normal(B, L, E)
    reference = nn.LayerNorm(E, bias=bias, eps=1e-3)
    reference.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x, residual), reference(x + residual))
    torch.testing.assert_close(norm(x), reference(x))
    y, total = norm.with_total(x, residual)
    torch.testing.assert_close((y, total), (reference(x + residual), x + residual))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_feed_forward_is_the_papers_formula(activation):
    module = FeedForward(E, WIDE, activation=activation).double()
    x = normal(B, L, E, dtype=torch.float64)
    hidden = x @ module.linear1.weight.T + module.linear1.bias
    activations = {
        "relu": hidden.clamp(min=0),
        "gelu": hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))),
        "silu": hidden / (1 + torch.exp(-hidden)),
    }
    torch.testing.assert_close(module(x), activations[activation] @ module.linear2.weight.T + module.linear2.bias)


def test_feed_forward_drops_activations():
    module = FeedForward(E, 10_000, dropout=0.25)
    nn.init.zeros_(module.linear1.weight), nn.init.ones_(module.linear1.bias)
    nn.init.constant_(module.linear2.weight, 1e-4)
    nn.init.zeros_(module.linear2.bias)
    with torch.no_grad():
        mean = module(torch.zeros(1, E))[0, 0].item()  # of 10,000 activations, each 0 or 4/3
        undropped = module.eval()(torch.zeros(1, E))[0, 0].item()
    assert mean == pytest.approx(1, abs=0.03)  # 5 standard deviations
    assert abs(mean - undropped) > 1e-4
    assert undropped == pytest.approx(1, abs=1e-4)  # 10,000 roundings, one after another on some processors


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("positions", ["interleaved", "concat_t2t", "concat_paper", None])
def test_token_embedding_is_the_papers_formula(positions, start):
    width = 8
    module = TokenEmbedding(11, width, positions=positions, padding_idx=0)
    tokens = torch.tensor([[3, 10, 1], [7, 0, 0]])
    expected = torch.zeros(2, 3, width)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        for i in range(width // 2):
            rate = 10000.0 ** -(i / (width / 2 - 1) if positions == "concat_t2t" else 2 * i / width)
            sin, cos = math.sin((start + column) * rate), math.cos((start + column) * rate)
            where = (2 * i, 2 * i + 1) if positions == "interleaved" else (i, width // 2 + i)
            if positions is not None:
                expected[row, column, where[0]], expected[row, column, where[1]] = sin, cos
        expected[row, column] += math.sqrt(width) * module.weight[tokens[row, column]].detach()
    torch.testing.assert_close(module(tokens, start=start), expected, atol=1e-5, rtol=1e-5)


def test_padding_tokens_give_no_gradient():
    module = TokenEmbedding(11, 8, padding_idx=0)
    module(torch.tensor([[3, 4, 3], [7, 0, 0]])).sum().backward()
    expected = torch.zeros(11)
    expected[[3, 4, 7]] = torch.tensor([2.0, 1.0, 1.0]) * math.sqrt(8)
    torch.testing.assert_close(module.weight.grad, expected[:, None].expand(11, 8))


# ------------------------------------------------------------------ initial weights, copies, hooks, errors


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_xavier_uniform_and_every_layers_own(kind):
    first, second = (KINDS[kind](d_model=64, num_heads=4, d_feedforward=256) for _ in range(2))
    for name, weight in first.named_parameters():
        other = dict(second.named_parameters())[name]
        if "norm" in name or "bias" in name:
            assert_equal(weight, torch.full_like(weight, 1.0 if "norm" in name and "weight" in name else 0.0))
            continue
        assert not torch.equal(weight, other)
        for matrix in weight.chunk(3) if "in_proj" in name else (weight,):
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.97 * bound < matrix.abs().max() <= bound
            assert abs(matrix.std() * math.sqrt(3) / bound - 1) < 0.05


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_stand_alone(kind, duplicate):
    layer = KINDS[kind](**SIZES).eval()
    twin = duplicate(layer)
    arguments = [normal(B, L, E)] + [normal(B, S, E)] * (kind == "decoder")
    expected = layer(*arguments)
    assert_equal(twin(*arguments), expected)
    nn.init.zeros_(layer.norm1.weight)
    assert_equal(twin(*arguments), expected)


def test_each_part_is_called_as_a_module():
    layer, called = DecoderLayer(**SIZES), []
    for name, part in layer.named_modules():
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    layer(normal(B, L, E), normal(B, S, E))
    assert sorted(called) == sorted(name for name, _ in layer.named_modules())


def test_unknown_weights_are_still_errors():
    state = EncoderLayer(**SIZES).state_dict()
    with pytest.raises(RuntimeError, match="linear3"):
        EncoderLayer(**SIZES).load_state_dict(state | {"linear3.weight": normal(2)})


def test_a_state_dict_being_loaded_is_left_as_it_was():
    state = nn.TransformerEncoderLayer(E, H, WIDE).state_dict()
    names = list(state)
    EncoderLayer(**SIZES).load_state_dict(state)
    assert list(state) == names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeedForward(E, WIDE, activation="tanh"), "activation must be one of relu, gelu, silu, got 'tanh'"),
        (lambda: TokenEmbedding(9, E, positions="learned"), "positions must be one of interleaved"),
    ],
)
def test_wrong_options_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
