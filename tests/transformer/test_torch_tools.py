"""What people do to modules: parametrize them, build them on meta, checkpoint them, count them, take them apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_transformer as ours
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.models import PAD, SOURCE, TARGET, tiny

E, H, F = 16, 4, 32


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_a_parametrized_projection_takes_effect(name):
    module, x = ours.MultiheadAttention(E, H, batch_first=True), normal(2, 5, E)
    nn.init.normal_(module.in_proj_bias)
    plain = ours.MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict(module.state_dict())
    parametrize.register_parametrization(module, name, Doubled())
    getattr(plain, name).data.mul_(2)
    for arguments in ((x, x, x), (x, x[:, :3], x[:, :3]), (x, x, -x)):  # each way to the projections
        assert_equal(module(*arguments), plain(*arguments))
    module(x, x, x)[0].sum().backward()
    assert module.parametrizations[name].original.grad.abs().sum() > 0


@pytest.mark.parametrize("normed", [weight_norm, spectral_norm])
@pytest.mark.parametrize("path", ["self_attn.out_proj", "feed_forward.linear1", "feed_forward.linear2"])
def test_normed_linears_take_effect(normed, path):
    layer, x = ours.EncoderLayer(E, H, F).eval(), normal(2, 5, E)
    before = layer(x)
    normed(layer.get_submodule(path))
    twin = ours.EncoderLayer(E, H, F).eval()
    twin.load_state_dict(layer.state_dict(), strict=False)
    twin.get_submodule(path).weight.data.copy_(layer.get_submodule(path).weight)
    assert_equal(layer(x), twin(x))
    with torch.no_grad():
        for original in layer.get_submodule(path).parametrizations.weight.parameters():
            original.mul_(3).add_(0.1)
    assert not torch.allclose(layer(x), before)


def test_a_model_is_built_on_meta_and_gets_its_weights_later():
    with torch.device("meta"):
        model = tiny().eval()
        logits = model(torch.empty(2, 6, dtype=torch.int64), torch.empty(2, 5, dtype=torch.int64))
    assert logits.is_meta and logits.shape == (2, 5, 31)
    twin = tiny().eval()
    model.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert_equal(model(SOURCE, TARGET), twin(SOURCE, TARGET))
    other = tiny().to("meta")
    other.load_state_dict(twin.state_dict(), assign=True)
    assert_equal(other.eval()(SOURCE, TARGET), twin(SOURCE, TARGET))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_checkpointed_layers_drop_the_same_again(reentrant):
    layer = ours.EncoderLayer(E, H, F, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3)
    x, upstream = normal(2, 5, E).requires_grad_(), normal(2, 5, E)

    def run(function):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        y = function(x)
        y.backward(upstream)
        return [y, x.grad, *(p.grad for p in layer.parameters())]

    assert_equal(run(lambda x: checkpoint(layer, x, use_reentrant=reentrant)), run(layer))
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    assert_equal(run(compiled), run(layer))


def test_gradients_of_each_example_by_vmap():
    """What privacy and influence tools do: vmap over grad of functional_call."""
    layer, examples = ours.EncoderLayer(E, H, F, dropout=0.0), normal(3, 5, E)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, example):
        return functional_call(layer, parameters, (example[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, examples)
    for index, example in enumerate(examples):
        layer.zero_grad()
        layer(example[None]).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][index], p.grad)


def test_a_model_under_vmap_and_on_fake_tensors():
    """Nothing chooses by numbers that are not there: padding is not looked for, and not packed away."""
    model = tiny().eval()
    sources, targets = torch.stack([SOURCE, SOURCE.flip(0)]), torch.stack([TARGET, TARGET.flip(0)])
    each = vmap(model)(sources, targets)
    for got, source, target in zip(each, sources, targets, strict=True):
        real = target != PAD
        torch.testing.assert_close(got[real], model(source, target)[real])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(SOURCE, TARGET).shape == (3, 5, 31)


def test_a_model_has_as_many_flops_as_torchs():
    theirs = nn.TransformerEncoderLayer(E, H, F, batch_first=True)
    counts = []
    for layer in (ours.EncoderLayer(E, H, F), theirs):
        with FlopCounterMode(display=False) as counter:
            layer(normal(2, 5, E).requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    # forward 2 products, and 5 of the 7 of ours backward; torch's math path has 4, as it keeps the weights
    assert counts[0] - counts[1] == 2 * 2 * 5 * 5 * E
