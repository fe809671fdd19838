"""fuse and unfuse: torch.nn's modules inside a model become ours and go back, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fused_transformer import MultiheadAttention, Transformer, TransformerConfig, fuse, unfuse
from fused_transformer import nn as ours_nn
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.fuse_cases import TOKENS, Classifier, OwnLayer
from tests.transformer.nn_cases import B, E, F, H, L, S, make, padding, randomised

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


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


def test_what_has_another_class_since_is_undone_later():
    model = nn.Sequential(nn.LayerNorm(E), nn.LayerNorm(E))
    fuse(model)
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    report = unfuse(model)
    assert [part.name for part in report.swapped] == ["0"]
    assert [(part.name, part.why) for part in report.kept] == [
        ("1", "of another class since: undo what changed it first")
    ]
    assert type(model[0]) is nn.LayerNorm
    parametrize.remove_parametrizations(model[1], "weight")
    assert [part.name for part in unfuse(model).swapped] == ["1"]
    assert type(model[1]) is nn.LayerNorm


def test_norms_of_nothing_are_torchs():
    for norm in (nn.LayerNorm(0), nn.RMSNorm(0)):
        fuse(norm)
        assert norm(torch.ones(3, 0)).shape == (3, 0)


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
