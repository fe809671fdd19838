"""fuse and unfuse: torch.nn's modules inside a model become ours and go back, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_transformer import MultiheadAttention, Transformer, TransformerConfig, fuse, unfuse
from fused_transformer import nn as ours_nn
from fused_transformer.nn.stand_in import OURS
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.nn_cases import B, E, F, H, L, S, make, padding, randomised

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass, which fuse can't know: it stays, and what is in it is swapped."""


class OwnNorm(nn.LayerNorm):
    pass


class Classifier(nn.Module):
    """What people build: a table, an encoder, a norm used twice, pooling by attention, a head."""

    def __init__(self, layer=nn.TransformerEncoderLayer):
        super().__init__()
        self.table = nn.Embedding(30, E)
        self.encoder = nn.TransformerEncoder(layer(E, H, F, 0.0, batch_first=True), 2)
        self.pool = nn.MultiheadAttention(E, H, batch_first=True)
        self.norm = self.same_norm = nn.LayerNorm(E)
        self.rms = nn.RMSNorm(E)
        self.register_buffer("query", torch.randn(1, 1, E))
        self.head = nn.Linear(E, 5)

    def forward(self, tokens):
        hidden = tokens == 0
        x = self.encoder(self.norm(self.table(tokens)), src_key_padding_mask=hidden)
        pooled, _ = self.pool(self.query.expand(len(x), 1, E), x, x, key_padding_mask=hidden)
        return self.head(self.rms(self.same_norm(pooled[:, 0])))


TOKENS = torch.tensor([[5, 3, 9, 7, 2], [4, 8, 0, 0, 0], [1, 1, 6, 2, 0]])
MODES = {"train": torch.enable_grad, "eval": torch.enable_grad, "no_grad": torch.no_grad}
MODES |= {"inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


def counting(monkeypatch, kind: type[nn.Module]) -> list:
    calls, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    return calls


# ------------------------------------------------------------------ the numbers, and that ours runs


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, OwnLayer])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_numbers_by_our_attention_in_every_mode(monkeypatch, mode, layer):
    model = randomised(Classifier(layer)).train(mode == "train")
    with MODES[mode]():
        expected = model(TOKENS)
        fuse(model)
        calls = counting(monkeypatch, MultiheadAttention)
        got = model(TOKENS)
    tolerance = {"atol": 0.05, "rtol": 0.05} if mode == "autocast" else {}
    torch.testing.assert_close(got, expected, **tolerance)
    assert [id(call) for call in calls] == [
        id(attention) for attention in (*(layer.self_attn for layer in model.encoder.layers), model.pool)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_inside_layers_and_stacks_that_stay_torchs_our_attention_and_norms_are_called(monkeypatch, mode):
    # in eval without gradients torch's encoder makes nested tensors, and its layer reads weights instead of calling
    model = randomised(nn.TransformerEncoder(make(nn, "encoder_layer"), 2)).train(mode == "train")
    src, hidden = normal(B, S, E), padding(9, 1, 4, size=S)
    with MODES[mode]():
        expected = model(src, src_key_padding_mask=hidden)
        for layer in model.layers:
            fuse(layer.self_attn), fuse(layer.norm1)
        assert type(model.layers[0]) is nn.TransformerEncoderLayer
        attentions, norms = counting(monkeypatch, MultiheadAttention), counting(monkeypatch, ours_nn.LayerNorm)
        got = model(src, src_key_padding_mask=hidden)
    assert {id(module) for module in attentions} == {id(layer.self_attn) for layer in model.layers}
    assert len(norms) == 2
    tolerance = {"atol": 0.05, "rtol": 0.05} if mode == "autocast" else {}
    torch.testing.assert_close(got[~hidden], expected[~hidden], **tolerance)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer", "encoder", "decoder", "transformer"])
def test_a_fused_module_is_like_one_made_as_ours(kind, norm_first):
    theirs = randomised(make(nn, kind, norm_first=norm_first))
    ours = make(ours_nn, kind, norm_first=norm_first)
    ours.load_state_dict(theirs.state_dict())
    report = fuse(theirs)
    assert not report.kept
    assert [type(module) for module in theirs.modules()] == [type(module) for module in ours.modules()]
    inputs = {
        "transformer": (normal(B, S, E), normal(B, L, E)),
        "encoder": (normal(B, S, E),),
        "decoder": (normal(B, L, E), normal(B, S, E)),
    }[kind.removesuffix("_layer")]
    assert_equal(theirs(*inputs), ours(*inputs))


def test_training_goes_on_with_the_optimizer_made_before():
    runs = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), 1e-1, momentum=0.9)
        if fused:
            fuse(model)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(TOKENS), torch.tensor([0, 1, 2])).backward()
            optimizer.step()
        runs.append(model.state_dict())
    torch.testing.assert_close(runs[1], runs[0])


# ------------------------------------------------------------------ what stays as it was


def everything(model: nn.Module) -> dict:
    """All that a module has, by identity: parameters, buffers, submodules, hooks, flags and other attributes."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                found |= {f"{name}.{key}.{inner}": id(x) for inner, x in value.items()}
            else:
                found[f"{name}.{key}"] = value if isinstance(value, (bool, int, float, str)) else id(value)
    return found


def test_parameters_hooks_and_flags_are_kept_and_unfuse_restores_everything():
    model, seen = Classifier(), []
    model.encoder.layers[0].eval()
    model.norm.weight.requires_grad_(False)
    for name in ("pool", "norm", "encoder"):
        getattr(model, name).register_forward_hook(lambda module, *_: seen.append(type(module)))
    parameters, modules = {n: id(p) for n, p in model.named_parameters()}, [id(m) for m in model.modules()]
    before, kinds, state = everything(model), [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())

    fuse(model)
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert [id(m) for m in model.modules()] == modules
    assert model.encoder.layers[0].training is False and model.encoder.layers[1].training
    assert not model.norm.weight.requires_grad
    assert_equal(model.state_dict(), state)
    model(TOKENS)
    assert [*seen] == [ours_nn.LayerNorm, ours_nn.TransformerEncoder, MultiheadAttention, ours_nn.LayerNorm]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))

    report = unfuse(model)
    assert len(report.swapped) == 12
    assert [type(m) for m in model.modules()] == kinds
    assert everything(model) == before


def test_the_model_itself_is_swapped_in_place():
    for kind in ("LayerNorm", "RMSNorm"):
        model = getattr(nn, kind)(E)
        report = fuse(model)
        assert type(model) is getattr(ours_nn, kind)
        assert [part.name for part in report.swapped] == [""]
        assert "(the model)" in str(report)
    model = nn.Transformer(E, H, 1, 1, F)
    holder = nn.ModuleList([model])
    fuse(model)
    assert type(holder[0]) is ours_nn.Transformer


def test_shared_modules_are_swapped_once():
    model = Classifier()
    report = fuse(model)
    assert type(model.norm) is ours_nn.LayerNorm and model.same_norm is model.norm
    assert [part.name for part in report.swapped].count("norm") == 1
    assert "same_norm" not in [part.name for part in report.swapped]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model = Classifier().to(dtype)
    fuse(model)
    assert model(TOKENS).dtype == dtype
    fuse(Classifier().to("meta"))


def test_fusing_twice_changes_nothing_more():
    model = Classifier()
    fuse(model)
    before = everything(model)
    assert fuse(model).swapped == ()
    assert everything(model) == before
    unfuse(model)
    assert unfuse(model).swapped == ()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_fused_model_can_be_unfused(duplicate):
    model = Classifier().eval()
    kinds = [type(module) for module in model.modules()]
    fuse(model)
    twin = duplicate(model)
    assert_equal(twin(TOKENS), model(TOKENS))
    unfuse(twin)
    assert [type(module) for module in twin.modules()] == kinds
    assert type(model.pool) is MultiheadAttention
    with torch.no_grad():
        torch.testing.assert_close(twin(TOKENS), model(TOKENS))


def test_what_was_made_as_ours_is_no_business_of_either():
    model = nn.Sequential(ours_nn.LayerNorm(E), make(ours_nn, "encoder"), nn.LayerNorm(E))
    assert [part.name for part in fuse(model).swapped] == ["2"]
    unfuse(model)
    assert [type(part) for part in model] == [ours_nn.LayerNorm, ours_nn.TransformerEncoder, nn.LayerNorm]
    paper = Transformer(
        TransformerConfig(source_vocab_size=20, d_model=E, num_heads=H, d_feedforward=F, norm_first=True)
    )
    report = fuse(paper)
    assert report.swapped == report.kept == ()


@pytest.mark.slow
def test_a_compiled_model_compiles_again():
    model = Classifier().eval()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(TOKENS)
    fuse(compiled)
    calls = []
    for part in (model.pool, model.encoder.layers[0].self_attn):
        part.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(compiled(TOKENS), expected)
    assert len(calls) == 2


# ------------------------------------------------------------------ what is left alone, and why


def why(model: nn.Module, name: str, **options) -> str | None:
    """The report's reason for `name`; None if it was swapped."""
    report = fuse(model, **options)
    assert [part.name for part in report.swapped].count(name) + [part.name for part in report.kept].count(name) == 1
    return next((part.why for part in report.kept if part.name == name), None)


def test_subclasses_are_left_alone():
    model = Classifier(OwnLayer)
    model.norm = OwnNorm(E)
    assert why(model, "norm") == "a subclass of torch.nn.LayerNorm, which may compute something else"
    assert type(model.norm) is OwnNorm and type(model.encoder.layers[0]) is OwnLayer
    assert type(model.encoder.layers[0].norm2) is ours_nn.LayerNorm


def test_a_subclass_of_ours_is_ours():
    class More(ours_nn.LayerNorm):
        pass

    report = fuse(nn.Sequential(More(E)))
    assert report.swapped == report.kept == ()


def test_parametrized_modules_are_left_alone():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.LayerNorm(E), nn.MultiheadAttention(E, H))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[1].out_proj, "weight", Doubled())
    x = normal(L, E)
    expected = model[0](x), model[1](x, x, x)[0]
    reason = why(model, "0")
    assert reason == "has parametrizations of weight: call fuse before registering them"
    assert type(model[1]) is MultiheadAttention  # out_proj is called, as what it is
    torch.testing.assert_close((model[0](x), model[1](x, x, x)[0]), expected)

    model = nn.LayerNorm(E)  # and so one may
    fuse(model)
    parametrize.register_parametrization(model, "weight", Doubled())
    torch.testing.assert_close(model(x), expected[0])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_and_pruning_by_hooks_go_on():
    layer = randomised(make(nn, "encoder_layer"))
    nn.utils.weight_norm(layer.linear1)
    nn.utils.weight_norm(layer.self_attn, "in_proj_weight")
    prune.random_unstructured(layer.norm1, "weight", 0.5)
    prune.random_unstructured(layer.linear2, "weight", 0.5)
    src = normal(B, L, E)
    expected = layer(src)
    assert why(layer, "") is None
    torch.testing.assert_close(layer(src), expected)
    with torch.no_grad():
        layer.linear1.weight_g.mul_(2)
        layer.self_attn.in_proj_weight_v.add_(0.1)
    got = layer(src)
    unfuse(layer)
    torch.testing.assert_close(got, layer(src))
    assert not torch.allclose(got, expected)


def test_modules_wrapped_by_others_are_called():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.low(x)

    layer = randomised(make(nn, "encoder_layer"))
    layer.linear1, layer.self_attn.out_proj = Adapter(layer.linear1), nn.Linear(E, E)
    src = normal(B, L, E)
    expected = layer(src)
    fuse(layer)
    torch.testing.assert_close(layer(src), expected)


def test_quantised_modules_are_left_alone():
    model = nn.Sequential(
        torch.ao.nn.quantizable.MultiheadAttention(E, H),
        torch.ao.nn.quantized.LayerNorm((E,), nn.Parameter(torch.ones(E)), nn.Parameter(torch.zeros(E)), 1.0, 0),
    )
    report = fuse(model)
    assert not report.swapped
    reasons = {part.name: part.why for part in report.kept}
    assert reasons["0"].startswith("quantised: torch.ao.nn.quantizable")
    assert reasons["1"].startswith("quantised: torch.ao.nn.quantized")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.LayerNorm(E)))
    assert why(model, "0") == "compiled by TorchScript: call fuse before torch.jit.script"


def test_a_replaced_forward_is_left_alone():
    norm = nn.LayerNorm(E)
    inner = norm.forward
    norm.forward = lambda x: inner(x) + 1
    model = nn.Sequential(norm)
    x = normal(L, E)
    expected = model(x)
    assert why(model, "0").startswith("its forward was replaced on the instance")
    assert_equal(model(x), expected)
    layer = make(nn, "encoder_layer")
    layer.norm1 = norm
    expected = layer(normal(B, L, E) * 0)
    fuse(layer)
    torch.testing.assert_close(layer(normal(B, L, E) * 0), expected)


def test_look_alikes_of_others_are_told():
    class RotaryAttention(nn.Module):
        pass

    class WrappingAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(E, H)

    report = fuse(nn.ModuleDict({"rotary": RotaryAttention(), "wrapping": WrappingAttention()}))
    assert [(part.name, part.kind, part.why) for part in report.kept] == [
        ("rotary", "RotaryAttention", "no class of torch.nn")
    ]
    assert [part.name for part in report.swapped] == ["wrapping.inner"]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["encoder.layers.0"], {"encoder.layers.0"}),
        (["encoder.layers.*.self_attn", "pool"], {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "pool"}),
        (["*"], {"encoder", "pool", "norm", "rms"}),
        (["enc"], set()),
    ],
)
def test_keep_leaves_modules_and_all_inside_them_alone(keep, kept):
    model = Classifier()
    report = fuse(model, keep=keep)
    assert kept <= {part.name for part in report.kept}
    assert all(part.why.startswith("keep has '") for part in report.kept)
    inside = {part.name for part in report.kept}
    for name, module in model.named_modules():
        within = any(name == top or name.startswith(f"{top}.") for top in kept)
        assert (name in inside) == (within and type(module) in OURS)
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("skip", [True, False])
def test_skip_padding_reaches_the_stacks(skip):
    model = randomised(nn.Transformer(E, H, 1, 1, F, 0.0, batch_first=True, norm_first=True))
    fuse(model, skip_padding=skip)
    src, tgt, hidden = normal(B, S, E), normal(B, L, E), padding(7, 2, 5, size=L)
    out = model(src, tgt, tgt_key_padding_mask=hidden)
    assert bool((out[hidden] == 0).all()) == skip
    unfuse(model)
    assert "skip_padding" not in model.encoder.__dict__


def test_the_report_is_short_and_says_what_happened():
    model = nn.ModuleDict({"model": nn.Transformer(E, H, 3, 2, F), "norm": OwnNorm(E)})
    lines = str(fuse(model)).splitlines()
    assert lines[0] == "swapped 29, left alone 1"
    assert "  model.encoder.layers.*.self_attn       MultiheadAttention × 3" in lines
    assert lines[-1] == "  norm  OwnNorm: a subclass of torch.nn.LayerNorm, which may compute something else"
    assert len(lines) < 25
    assert str(fuse(nn.Linear(2, 2))) == "swapped 0, left alone 0"
