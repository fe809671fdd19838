"""What fuse leaves alone, and that its report says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fused_transformer import MultiheadAttention, fuse, unfuse
from fused_transformer import nn as ours_nn
from fused_transformer.nn.stand_in import OURS
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.fuse_cases import TOKENS, Classifier, OwnLayer, OwnNorm
from tests.transformer.nn_cases import B, E, F, H, L, S, make, padding, randomised

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


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
    assert why(model, "0") == "compiled by TorchScript, which can't compile ours: torch.jit.trace can"


def test_skip_padding_reaches_stacks_that_are_ours_already():
    model = make(nn, "transformer")
    fuse(model)
    fuse(model, keep=["decoder"], skip_padding=True)
    assert model.encoder.skip_padding is True and "skip_padding" not in model.decoder.__dict__


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
