"""fused_transformer.nn's classes as modules: hooks, replaced parts, copies, compilers, norms of any shape, autocast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from fused_transformer import nn as ours_nn
from fused_transformer.nn.parts import plain
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.nn_cases import B, E, F, H, L, S, assert_same_as_torch, causal, make, padding, twins

KINDS = ("encoder_layer", "decoder_layer", "encoder", "decoder", "transformer")


def arguments(kind: str) -> tuple:
    if kind == "transformer":
        return normal(B, S, E), normal(B, L, E)
    return (normal(B, L, E),) if "encoder" in kind else (normal(B, L, E), normal(B, S, E))


# ------------------------------------------------------------------ hooks and replaced parts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_hooked_parts_are_called_with_what_torch_shows_them(kind, norm_first, padded):
    ours, theirs = twins(kind, norm_first=norm_first)
    ours.skip_padding = True
    seen = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        seen[name] = {}
        for part_name, part in model.named_modules():
            part.register_forward_hook(
                lambda _module, args, out, part=part_name, seen=seen[name]: seen.update(
                    {part: (args[0], out[0] if isinstance(out, tuple) else out)}
                )
            )
    hidden = {f"{'src' if kind == 'encoder' else 'tgt'}_key_padding_mask": padding(7, 2, 5, size=L)} if padded else {}
    inputs = arguments(kind)
    ours(*inputs, **hidden), theirs(*inputs, **hidden)
    more = {name for name in seen["ours"] if name.endswith("attn.out_proj")}  # torch calls no out_proj
    assert seen["ours"].keys() - more == seen["theirs"].keys()
    assert {f"layers.1.{part}" for part in ("self_attn", "linear2", "norm2", "dropout1")} <= seen["ours"].keys()
    for name in seen["theirs"]:
        if padded and name == "":
            continue  # the stack itself: rows of padding are 0
        torch.testing.assert_close(
            seen["ours"][name], seen["theirs"][name], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("part", ["norm2", "dropout1", "linear1", "self_attn"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_hook_on_a_part_may_change_its_result(norm_first, part):
    ours, theirs = twins("encoder", norm_first=norm_first)

    def doubled(_module, _args, out):
        return (2 * out[0], out[1]) if isinstance(out, tuple) else 2 * out

    for model in (ours, theirs):
        getattr(model.layers[1], part).register_forward_hook(doubled)
    src = normal(B, L, E)
    torch.testing.assert_close(ours(src), theirs(src))


@pytest.mark.parametrize("norm_first", [False, True])
def test_replaced_parts_are_called(norm_first):
    class LowRank(nn.Module):
        """A linear layer with an adapter beside it, as LoRA has it."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.low = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)

        def forward(self, x):
            return self.linear(x) + self.low(x)

    ours, theirs = twins("encoder", norm_first=norm_first)
    for model in (ours, theirs):
        for layer in model.layers:
            layer.linear1, layer.linear2 = LowRank(layer.linear1), LowRank(layer.linear2)
            layer.norm2 = nn.RMSNorm(E)
            layer.dropout1 = nn.Identity()
            layer.activation = nn.Softplus()
    ours.load_state_dict(theirs.state_dict())
    ours.skip_padding = True
    hidden = padding(7, 2, 5, size=L)
    src = normal(B, L, E)
    torch.testing.assert_close(
        ours(src, src_key_padding_mask=hidden)[~hidden], theirs(src, src_key_padding_mask=hidden)[~hidden]
    )


def test_a_part_that_mixes_positions_is_never_given_packed_ones():
    class Centred(nn.Module):
        def forward(self, x):
            assert x.shape == (B, L, E)
            return x - x.mean(1, keepdim=True)

    encoder, _ = twins("encoder")
    encoder.skip_padding, encoder.layers[0].dropout2 = True, Centred()
    hidden = padding(7, 2, 5, size=L)
    assert encoder(normal(B, L, E), src_key_padding_mask=hidden)[hidden].abs().max() == 0


def test_parametrized_and_pruned_parts_keep_their_meaning():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    ours, theirs = twins("encoder_layer")
    for layer in (ours, theirs):
        parametrize.register_parametrization(layer.linear1, "weight", Halved())
        parametrize.register_parametrization(layer.norm1, "weight", Halved())
        parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Halved())
        prune.l1_unstructured(layer.linear2, "weight", amount=0.5)
    assert not plain(ours.norm1, ours_nn.LayerNorm)
    src = normal(B, L, E)
    torch.testing.assert_close(ours(src), theirs(src))


def test_an_attention_of_ones_own_is_called_as_torch_calls_it():
    class Own(nn.Module):
        batch_first = True

        def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, need_weights=True, is_causal=False):
            assert key_padding_mask is hidden and attn_mask is None and not need_weights and not is_causal
            return query.flip(-1), None

    hidden = padding(7, 2, 5, size=L)
    layer, src = make(ours_nn, "encoder_layer"), normal(B, L, E)
    layer.self_attn = Own()
    x = layer.norm1(src + src.flip(-1))
    expected = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    torch.testing.assert_close(layer(src, src_key_padding_mask=hidden), expected)


def test_plain_tells_what_may_be_fused():
    norm = ours_nn.LayerNorm(E)
    assert plain(norm, ours_nn.LayerNorm) and not plain(norm, nn.LayerNorm)
    for change in (
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: m.compile(backend="eager"),
    ):
        changed = ours_nn.LayerNorm(E)
        change(changed)
        assert not plain(changed, ours_nn.LayerNorm)
    attention = ours_nn.MultiheadAttention(E, H)
    assert plain(attention, ours_nn.MultiheadAttention)  # its own hook, which does nothing, does not count
    attention.register_forward_pre_hook(lambda *_: None)
    assert not plain(attention, ours_nn.MultiheadAttention)


# ------------------------------------------------------------------ copies, warnings, compilers


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_stand_alone(kind, duplicate):
    module = make(ours_nn, kind, layers=1).eval()
    twin, inputs = duplicate(module), arguments(kind)
    expected = module(*inputs)
    assert_equal(twin(*inputs), expected)
    assert [type(part) for part in twin.modules()] == [type(part) for part in module.modules()]
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert_equal(twin(*inputs), expected)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_activation_that_is_a_module_survives_copying(kind):
    layer = make(ours_nn, f"{kind}_layer", activation=nn.GELU())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(copy.deepcopy(layer))):
        assert isinstance(twin.activation, nn.GELU)
        assert_equal(twin(*(inputs := arguments(f"{kind}_layer"))), layer(*inputs))
    stack = make(ours_nn, kind, activation=nn.GELU())
    assert all(isinstance(layer.activation, nn.GELU) for layer in stack.layers)


def test_no_option_makes_nested_tensors_or_warnings():
    for options in ({"norm_first": True}, {"batch_first": False}, {"bias": False}, {"activation": torch.tanh}):
        layer = make(ours_nn, "encoder_layer", **options)
        encoder = ours_nn.TransformerEncoder(layer, 1, enable_nested_tensor=True, mask_check=False)
        assert encoder.enable_nested_tensor and not encoder.mask_check and not encoder.use_nested_tensor
    ours_nn.Transformer(E, H, 1, 1, F)


def test_a_wrong_promise_that_padding_is_on_the_right_does_no_harm():
    layer = make(ours_nn, "encoder_layer")
    encoder = ours_nn.TransformerEncoder(layer, 1, mask_check=False)  # in torch: the mask is left aligned, don't look
    hidden, src = padding(7, 2, 5, size=L).flip(1), normal(B, L, E)
    torch.testing.assert_close(encoder(src, src_key_padding_mask=hidden), encoder.layers[0](src, None, hidden))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_empty_stack_is_its_norm(kind):
    stack, inputs = make(ours_nn, kind, layers=0), arguments(kind)
    assert_equal(stack(*inputs), stack.norm(inputs[0]))


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_compiled_equals_eager(kind, norm_first):
    model, _ = twins(kind, norm_first=norm_first)
    model.skip_padding = True
    inputs = [x.requires_grad_() for x in arguments(kind)]
    hidden = {f"{'src' if kind == 'encoder' else 'tgt'}_key_padding_mask": padding(7, 2, 5, size=L)}
    expected = model(*inputs, **hidden)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(*inputs, **hidden)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), inputs), gradients)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torch copies the layer with it
@pytest.mark.parametrize(
    "mask", [{"src_key_padding_mask": padding(7, 2, 5, size=L)}, {"mask": causal(L)}], ids=["padding", "causal"]
)
def test_nothing_is_decided_by_numbers_that_are_not_there(mask):
    encoder, _ = twins("encoder")
    encoder.skip_padding = True
    src = normal(B, L, E)
    expected = encoder(src, **mask)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = make(ours_nn, "encoder")
        fake.skip_padding = True
        masks = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in mask.items()}
        assert fake(torch.empty(src.shape), **masks).shape == src.shape
    on_meta = {name: x.to("meta") for name, x in mask.items()}
    assert copy.deepcopy(encoder).to("meta")(src.to("meta"), **on_meta).shape == src.shape
    (name,) = mask
    two = torch.func.vmap(lambda x, m: encoder(x, **{name: m}))(src.expand(2, -1, -1, -1), mask[name].expand(2, -1, -1))
    torch.testing.assert_close(two, expected.expand(2, -1, -1, -1))


# ------------------------------------------------------------------ norms


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6)], ids=str)
def test_layer_norm_equals_torchs(shape, options):
    theirs, ours = nn.LayerNorm(shape, **options), ours_nn.LayerNorm(shape, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert_same_as_torch(ours, theirs, {"input": normal(3, 4, 5, 6)})
    assert ours(normal(0, 4, 5, 6)).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 6)], ids=str)
def test_rms_norm_equals_torchs(shape, options):
    theirs, ours = nn.RMSNorm(shape, **options), ours_nn.RMSNorm(shape, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    assert_same_as_torch(ours, theirs, {"x": normal(3, 4, 5, 6)})


def test_rms_norms_default_eps_is_that_of_the_arithmetic():
    for dtype, eps in ((torch.float16, 2.0**-23), (torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        x = torch.full((4,), 2.0**-10, dtype=dtype)  # exact in each dtype, and its square is near eps
        expected = 2.0**-10 / (2.0**-20 + eps) ** 0.5
        assert ours_nn.RMSNorm(4, dtype=dtype)(x)[0].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_want_their_shape(name):
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match=r"Given normalized_shape=\[5, 6\], expected input with shape \[\*, 5, 6\]"):
            getattr(ours_nn, name)((5, 6))(normal(4, 6, 5))
        with pytest.raises(error, match="Given normalized_shape"):
            getattr(ours_nn, name)((5, 6))(normal(6))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_layer_norm_takes_nested_tensors():
    norm, rows = ours_nn.LayerNorm(6), [normal(3, 6), normal(2, 6)]
    out = norm(torch.nested.as_nested_tensor(rows))
    torch.testing.assert_close(list(out.unbind()), [norm(x) for x in rows])


def test_a_second_derivative_is_an_error():
    x = normal(3, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(ours_nn.LayerNorm(6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", ["encoder_layer", "decoder_layer"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast_gives_torchs_dtype(kind, norm_first):
    ours, theirs = twins(kind, norm_first=norm_first)
    inputs = arguments(kind)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(*inputs), theirs(*inputs)
        assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
