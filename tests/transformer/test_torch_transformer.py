"""torch.nn.Transformer in ours: the same logits, the same greedy translations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_transformer import greedy
from fused_transformer import nn as fused_nn
from fused_transformer.checkpoint import load_model, save_model
from fused_transformer.integrations.torch_transformer import from_torch
from fused_transformer.kernels import sinusoidal_positions
from tests.transformer.models import SOURCE, TARGET

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.nn's own, in the constructor: why its fast path is not taken
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]

V, PAD, BOS, EOS = 31, 0, 1, 2
SIZES = {"d_model": 24, "nhead": 3, "num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 40}
TOKENS = {"padding_idx": PAD, "bos_idx": BOS, "eos_idx": EOS}
VARIANTS = {
    "default": {},
    "pre_norm": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "silu": {"activation": F.silu},
    "without_biases": {"bias": False},
    "eps": {"layer_norm_eps": 0.1},
}


class Theirs(nn.Module):
    """What one builds around nn.Transformer."""

    def __init__(self, tie="separate", positions="interleaved", scale=True, bias=False, kind=nn.Transformer, **options):
        super().__init__()
        self.transformer = kind(**SIZES | options, dropout=0.0, batch_first=True)
        self.source = nn.Embedding(V, 24)
        self.target = self.source if tie == "shared" else nn.Embedding(V, 24)
        self.generator = nn.Linear(24, V, bias=bias)
        for name, x in self.named_parameters():
            nn.init.normal_(x, float("norm" in name and "weight" in name), 0.2)
        if tie != "separate":
            self.generator.weight = self.target.weight
        self.positions, self.scale = positions, math.sqrt(24) if scale else 1.0

    def embed(self, table, tokens):
        x = table(tokens) * self.scale
        return x if self.positions is None else x + sinusoidal_positions(tokens.shape[1], 24, layout=self.positions)

    def forward(self, source, target):
        hidden = self.transformer(
            self.embed(self.source, source),
            self.embed(self.target, target),
            tgt_mask=torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=source == PAD,
            memory_key_padding_mask=source == PAD,
        )
        return self.generator(hidden)

    def imported(self, **options):
        given = TOKENS | {"positions": self.positions, "embedding_scale": self.scale} | options
        return from_torch(self.transformer, self.source, self.target, self.generator, **given)


def assert_equal(theirs, ours):
    theirs.eval()
    real = TARGET != PAD
    torch.testing.assert_close(ours(SOURCE, TARGET)[real], theirs(SOURCE, TARGET)[real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_equal(variant):
    theirs = Theirs(**VARIANTS[variant])
    assert_equal(theirs, theirs.imported())


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("positions", ["interleaved", "concat_t2t", "concat_paper", None])
@torch.no_grad()
def test_positions_and_scales(positions, scale):
    theirs = Theirs(positions=positions, scale=scale)
    assert_equal(theirs, theirs.imported())


@pytest.mark.parametrize("tie", ["shared", "target", "separate"])
@pytest.mark.parametrize("plain", [True, False])
@torch.no_grad()
def test_what_is_tied_stays_so_where_it_can(tie, plain):
    theirs = Theirs(tie=tie, bias=not plain)
    ours = theirs.imported()
    assert ours.config.tie_embeddings == (tie if plain else "separate")
    assert_equal(theirs, ours)


@torch.no_grad()
def test_defaults_are_the_papers():
    theirs = Theirs(tie="shared")
    ours = from_torch(theirs.transformer, theirs.source, positions="interleaved", **TOKENS)
    assert ours.config.tie_embeddings == "shared"
    assert_equal(theirs, ours)


@pytest.mark.parametrize("variant", ["default", "pre_norm"])
@torch.no_grad()
def test_greedy_translations_are_equal(variant):
    theirs = Theirs(bias=True, **VARIANTS[variant]).eval()
    theirs.generator.bias[PAD] = -1e4
    found = greedy(theirs.imported(), SOURCE, max_lengths=torch.tensor([15, 15, 15]))
    for source, beams in zip(SOURCE, found.tolist(), strict=True):
        tokens = torch.tensor([[BOS]])
        for _ in range(15):
            following = theirs(source[source != PAD][None], tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
            if following.item() == EOS:
                break
        words = [token for token in tokens[0, 1:].tolist() if token != EOS]
        assert beams[0] == words


@torch.no_grad()
def test_our_own_transformer_and_other_stacks():
    theirs = Theirs(kind=fused_nn.Transformer)
    assert_equal(theirs, theirs.imported())
    plain = Theirs()
    plain.transformer.encoder.norm = None  # post-norm as in the paper, in one stack
    ours = plain.imported()
    assert ours.encoder.norm is None and ours.decoder.norm is not None
    assert_equal(plain, ours)


@torch.no_grad()
def test_activations_that_are_modules():
    theirs = Theirs()
    for layer in (*theirs.transformer.encoder.layers, *theirs.transformer.decoder.layers):
        layer.activation = nn.GELU()
    ours = theirs.imported()
    assert ours.config.activation == "gelu"
    assert_equal(theirs, ours)
    # torch.nn's constructor loses the module in the decoder, where copies of the layer have relu.
    with pytest.raises(ValueError, match=r"decoder\.layers\.0 has activation relu, and the layers before it gelu"):
        Theirs(activation=nn.GELU()).imported()


@torch.no_grad()
def test_it_saves_and_loads_with_its_final_norms(tmp_path):
    theirs = Theirs(bias=True)
    save_model(tmp_path / "model", theirs.imported())
    assert_equal(theirs, load_model(tmp_path / "model"))


def test_weights_are_copies_in_their_dtype():
    theirs = Theirs().double()
    ours = theirs.imported()
    assert {x.dtype for x in ours.parameters()} == {torch.float64} and not ours.training
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    with torch.no_grad():
        for x in ours.parameters():
            x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())


class _OtherLayer(nn.TransformerEncoderLayer):
    pass


def _other_layer(theirs):
    theirs.transformer.encoder.layers[1].__class__ = _OtherLayer


def _added_key(theirs):
    theirs.transformer.encoder.layers[0].self_attn = nn.MultiheadAttention(24, 3, add_bias_kv=True, batch_first=True)


def _set(path, value):
    def change(theirs):
        owner, _, name = f"transformer.{path}".rpartition(".")
        setattr(theirs.get_submodule(owner), name, value)

    return change


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"activation": F.tanh}, None, r"transformer\.encoder\.layers\.0 has activation"),
        ({"activation": nn.GELU("tanh")}, None, "has activation GELU.*known are relu, silu, and gelu without"),
        ({"norm_first": True}, _set("decoder.norm", None), "decoder.norm is None: a pre-norm stack ends with a norm"),
        ({}, _set("encoder.norm", nn.RMSNorm(24)), "encoder.norm must be a torch.nn.LayerNorm, got RMSNorm"),
        ({}, _set("encoder.norm.eps", 0.1), "encoder.norm has eps 0.1, and its layers 1e-05"),
        ({}, _set("encoder.layers.1.norm2", nn.RMSNorm(24)), r"layers\.1\.norm2 must be a torch.nn.LayerNorm"),
        ({}, _set("encoder.layers.0.linear1", nn.Identity()), r"layers\.0\.linear1 must be a torch.nn.Linear"),
        ({}, _set("decoder.layers.1.norm3.eps", 0.1), "more than one value of its norms' eps: 1e-05, 1e-05, 0.1"),
        ({}, _set("decoder.layers.2.norm_first", True), "layers.2 has norm_first True, and the layers before it False"),
        ({}, _other_layer, "layers.1 must be a torch.nn.TransformerEncoderLayer, got _OtherLayer"),
        ({}, _added_key, "has an attention with kdim, vdim, add_bias_kv or add_zero_attn"),
        ({"num_encoder_layers": 0, "num_decoder_layers": 0}, None, "the transformer has no layers"),
        ({}, lambda theirs: setattr(theirs.source, "max_norm", 1.0), "source_embedding.max_norm can't be followed"),
        (
            {},
            lambda theirs: setattr(theirs, "source", nn.Embedding(V, 8)),
            "must have width 24, .*got 8",
        ),
    ],
)
def test_what_our_model_cannot_follow_is_refused(options, change, message):
    theirs = Theirs(**options)
    if change is not None:
        change(theirs)
    with pytest.raises(ValueError, match=message):
        theirs.imported()


@pytest.mark.parametrize("scale", [0, 0.0, math.inf, -math.inf, math.nan])
def test_a_scale_that_leaves_no_embedding_is_refused(scale):
    with pytest.raises(ValueError, match="embedding_scale must be finite and not 0, got"):
        Theirs().imported(embedding_scale=scale)


@torch.no_grad()
def test_a_negative_scale():
    theirs = Theirs()
    theirs.scale = -2
    assert_equal(theirs, theirs.imported())


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_stacks_of_the_callers_own_are_refused(stack):
    transformer = nn.Transformer(24, 3, 1, 1, 40, batch_first=True, **{f"custom_{stack}": nn.Identity()})
    with pytest.raises(
        ValueError, match=rf"transformer\.{stack} must be a torch\.nn\.Transformer\w+coder, got Identity"
    ):
        from_torch(transformer, nn.Embedding(V, 24), positions=None, **TOKENS)


def test_other_classes_are_refused():
    theirs = Theirs()
    with pytest.raises(TypeError, match=r"transformer must be a torch\.nn\.Transformer, got TransformerEncoder"):
        from_torch(theirs.transformer.encoder, theirs.source, positions=None, **TOKENS)
    with pytest.raises(TypeError, match="embedding_scale must be a number, got str"):
        theirs.imported(embedding_scale="1")
    with pytest.raises(TypeError, match=r"source_embedding must be a torch\.nn\.Embedding, got Linear"):
        from_torch(theirs.transformer, theirs.generator, positions=None, **TOKENS)
