"""The ops under torch.func, for tensors without memory, and where every operator is looked at."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from fused_transformer import kernels
from fused_transformer.kernels import attention, decode_attention, embedding, layer_norm, rms_norm
from tests.inputs import normal
from tests.kernels.calls import CALLS, DIFFERENTIABLE, Call, seed
from tests.oracle import assert_equal

# ---------------------------------------------------------------- torch.func


def loss(call: Call, **tensors) -> torch.Tensor:
    outputs = call.run(**tensors)
    return sum(x.square().sum() for x in ([outputs] if torch.is_tensor(outputs) else outputs))


def floats(call: Call) -> dict[str, torch.Tensor]:
    return {name: x for name, x in call.tensors.items() if x.is_floating_point()}


def expected_gradients(call: Call) -> dict[str, torch.Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in floats(call).items()}
    return dict(zip(leaves, torch.autograd.grad(loss(call, **leaves), list(leaves.values())), strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_grad_gives_what_autograd_gives(name, device):
    call = CALLS[name](device)
    assert_equal(grad(lambda tensors: loss(call, **tensors))(floats(call)), expected_gradients(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_each_example_alone(name, device):
    """vmap of grad, the way to per-example gradients: each tensor in turn has examples, the others are shared."""
    call = CALLS[name](device)
    for varied, x in floats(call).items():
        examples = torch.stack([x, 2.0 * x, x - 1.0])
        got = vmap(grad(lambda example, varied=varied: loss(call, **{varied: example})))(examples)
        for one, example in zip(got, examples, strict=True):
            assert_equal(one, expected_gradients(call._replace(tensors={**call.tensors, varied: example}))[varied])


def test_vmap_over_any_axis_and_within_itself():
    x, weight = normal(2, 3, 4, 8), normal(3, 8)
    got = vmap(vmap(rms_norm, in_dims=(0, None)), in_dims=(1, 0))(x, weight)
    assert_equal(got, torch.stack([rms_norm(x[:, i], weight[i]) for i in range(3)]))
    q, cache, lengths = normal(2, 4, 1, 8), normal(2, 2, 6, 8), torch.tensor([[1, 2], [6, 0]])
    got = vmap(lambda n: decode_attention(q, cache, cache, n), in_dims=1)(lengths)
    assert_equal(got, torch.stack([decode_attention(q, cache, cache, n) for n in lengths.T]))


def test_jacobians_by_reverse_mode():
    x = normal(4, 8)
    jacobian = jacrev(lambda row: layer_norm(row))(x[0])
    expected = torch.autograd.functional.jacobian(lambda row: torch.nn.functional.layer_norm(row, (8,)), x[0])
    torch.testing.assert_close(jacobian, expected)


def test_dropout_under_vmap_asks_torch_for_its_randomness():
    x = normal(3, 4, 64)
    dropped = partial(kernels.add_layer_norm, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="random"):
        vmap(dropped)(x, x)
    same = vmap(dropped, randomness="same")(x[:1].expand(3, -1, -1), x[:1].expand(3, -1, -1))
    assert torch.equal(same[0], same[1])
    different = vmap(dropped, randomness="different")(x[:1].expand(3, -1, -1), x[:1].expand(3, -1, -1))
    assert not torch.equal(different[0], different[1])
    given = vmap(lambda x: dropped(x, x, seed=seed()))(x)
    assert_equal(given, torch.stack([dropped(row, row, seed=seed()) for row in x]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of torch's own, for its jvp
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_and_second_derivatives_say_that_there_are_none(name):
    call = CALLS[name]("cpu")
    tensors = (floats(call),)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .*: use grad, vjp or jacrev"):
        jvp(lambda tensors: loss(call, **tensors), tensors, tensors)
    first = grad(lambda tensors: loss(call, **tensors))
    with pytest.raises(NotImplementedError, match="once differentiable"):
        grad(lambda tensors: sum(x.square().sum() for x in first(tensors).values()))(*tensors)


# embedding's is linear in the table, and the gradients of rectified numbers do not change with them
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if not name.startswith("embedding")])
@pytest.mark.parametrize("constant", [False, True])
def test_a_gradient_of_a_gradient_is_an_error_and_not_left_out(name, constant):
    """Whoever asks for it: backward(), and torch.autograd.grad, which follows what leads to its inputs alone."""
    call = CALLS[name]("cpu")
    leaves = {name: x.detach().requires_grad_() for name, x in floats(call).items()}
    output = call._replace(tensors={**call.tensors, **leaves}).run()
    output = output if torch.is_tensor(output) else output[0]
    upstream = torch.ones_like(output).requires_grad_(not constant)
    x = next(iter(leaves.values()))
    (gradient,) = torch.autograd.grad(output, x, upstream, create_graph=True)
    again = gradient.square().sum()
    for differentiate in (lambda: torch.autograd.grad(again, x, allow_unused=True, retain_graph=True), again.backward):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            differentiate()


# ---------------------------------------------------------------- tensors without memory


@pytest.mark.parametrize("name", CALLS)
def test_meta_and_fake_tensors_give_what_the_real_ones_have(name):
    call = CALLS[name]("cpu")
    real = _outputs(call)
    arguments = {"tensors": call.tensors, "options": call.options}
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments)
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
    for device, stand_in in (("meta", meta), ("cpu", fake)):
        got = _outputs(call._replace(**stand_in))
        for one, other in zip(got, real, strict=True):
            assert one.device.type == device
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def _outputs(call: Call) -> tuple:
    outputs = call.run()
    return (outputs,) if torch.is_tensor(outputs) else outputs


def test_a_gradient_on_meta_tensors():
    x, weight = torch.empty(3, 8, device="meta", requires_grad=True), torch.empty(8, device="meta", requires_grad=True)
    layer_norm(x, weight).sum().backward()
    assert x.grad.is_meta and weight.grad.shape == (8,)


def test_make_fx_records_the_gradient_as_a_node():
    x = normal(3, 8)
    graph = make_fx(grad(lambda x: layer_norm(x).square().sum()))(x)
    nodes = [str(node.target) for node in graph.graph.nodes]
    assert "fused_transformer.layer_norm.default" in nodes and "fused_transformer.layer_norm_backward.default" in nodes
    assert_equal(graph(x), grad(lambda x: layer_norm(x).square().sum())(x))


# ---------------------------------------------------------------- counting and keeping


def test_flops_of_attention_are_those_of_its_products():
    batch, heads, length, keys, width = 2, 3, 5, 7, 8
    q, k = normal(batch, heads, length, width).requires_grad_(), normal(batch, heads, keys, width)
    product = 2 * batch * heads * length * keys * width

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            out = function()
            forward = counter.get_total_flops()
            if out.requires_grad:
                out.sum().backward()
        return forward / product, (counter.get_total_flops() - forward) / product

    assert counted(lambda: attention(q, k, k)) == (2, 5)  # as torch counts scaled_dot_product_attention
    compiled = torch.compile(lambda: attention(q, k, k), backend="aot_eager")
    assert counted(compiled) == (2, 5)
    lse = normal(batch, heads, length)
    assert counted(lambda: kernels.attention_weights(q, k, lse)) == (1, 3)
    with torch.no_grad():
        assert counted(lambda: decode_attention(q, k, k)) == (2, 0)


def test_flops_of_a_packed_batch_are_those_of_sequences_of_equal_length():
    q, offsets = normal(12, 3, 8), torch.tensor([0, 2, 6, 12])
    with FlopCounterMode(display=False) as counter:
        attention(q, q, q, q_offsets=offsets)
    assert counter.get_total_flops() == 2 * (2 * 3 * 3 * 4 * 4 * 8)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing_draws_the_same_mask_again(reentrant):
    x, table = normal(3, 24).requires_grad_(), normal(3, 24)

    def function(x):
        total = kernels.add_layer_norm(x, table, dropout_p=0.5)
        heads = total.view(1, 1, 3, 24)
        return attention(heads, heads, heads, dropout_p=0.5)

    def run(wrapped):
        torch.manual_seed(3)
        x.grad = None
        out = wrapped(x)
        out.square().sum().backward()
        return out, x.grad

    assert_equal(run(lambda x: checkpoint(function, x, use_reentrant=reentrant)), run(function))


def test_selective_checkpointing_can_keep_what_attention_gave(monkeypatch):
    """The policy sees the op by its name, and what it keeps is not computed again."""
    ran = []
    for name in ("attention", "layer_norm"):
        module = kernels.OPS[name].module("reference")

        def forward(*args, name=name, original=module.forward):
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(module, "forward", forward)

    def policy(_context, operator, *_args, **_kwargs):
        keeps = operator is torch.ops.fused_transformer.attention.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    x = normal(1, 2, 5, 8).requires_grad_()

    def function(x):
        return attention(rms_norm(x), x, x)

    contexts = partial(create_selective_checkpoint_contexts, policy)
    gradients = []
    for options in ({}, {"context_fn": contexts}):
        ran.clear()
        with kernels.use_backend("reference"):
            out = checkpoint(function, x, use_reentrant=False, **options)
            gradients.append(torch.autograd.grad(out.sum(), x)[0])
        assert ran == ["layer_norm", "attention", "layer_norm"] + ["attention"] * (not options)
    assert_equal(*gradients)


def test_fake_tokens_and_starts():
    with FakeTensorMode():
        tokens, table = torch.empty(2, 3, dtype=torch.int64), torch.empty(7, 4, requires_grad=True)
        out = embedding(tokens, table, start=torch.empty(2, dtype=torch.int64))
        out.sum().backward()
    assert out.shape == (2, 3, 4) and table.grad.shape == (7, 4)
