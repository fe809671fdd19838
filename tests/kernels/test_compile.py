"""The ops as operators of torch: one node each under torch.compile and torch.export, with eager's bits."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_transformer import kernels
from fused_transformer.kernels import OPS, attention, embedding, use_backend
from tests.inputs import normal, running_on
from tests.kernels.calls import CALLS, DIFFERENTIABLE, seed
from tests.oracle import assert_equal, run_with_gradients

NAMESPACE = "fused_transformer::"
BACKENDS = ("cuda", "triton", "cpu", "reference")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Watching(TorchDispatchMode):
    """Sees every operator that is called: so the ops are operators inside. Keeps the calls of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(NAMESPACE):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def run(call, function=None):
    """The call's outputs and gradients by name."""
    function = function or call.function
    if call.function in (kernels.decode_attention_with_lse, kernels.log_softmax_top_k):
        with torch.no_grad():
            return dict(enumerate(function(**call.tensors, **call.options)))
    return run_with_gradients(function, call.tensors, **call.options)


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_node_gives_what_the_eager_call_gives(name, backend, device):
    call = CALLS[name](device)
    with running_on(backend):
        expected = run(call)
        with Watching() as watching:
            got = run(call)
    assert watching.calls, "the op was not called through torch's dispatcher"
    if device == "cuda" and backend != "cuda":  # a node's backward pass chooses anew there: see use_backend
        outputs = [name for name in expected if not str(name).startswith("d")]
        got, expected = ({name: results[name] for name in outputs} for results in (got, expected))
    assert_equal(got, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_operators_keep_torchs_rules(name, backend, device):
    """opcheck on what the call calls, forward and backward: schema, fake outputs, autograd, all under AOT autograd."""
    call = CALLS[name](device)
    forced = use_backend(backend) if backend else nullcontext()
    with forced:
        with Watching() as watching:
            run(call)
        for operator, args in watching.calls:
            forward = not operator.name().endswith("_backward")  # which has no gradient itself
            leaves = [x.detach().requires_grad_(forward and x.requires_grad) if torch.is_tensor(x) else x for x in args]
            torch.library.opcheck(operator, leaves)


def test_every_operator_is_among_those_calls():
    called = set()
    for make in CALLS.values():
        with Watching() as watching:
            run(make("cpu"))
        called |= {operator.name() for operator, _ in watching.calls}
    assert called == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)}
    # Packed weights are no tensors, which all an operator takes: these three are for eager inference.
    assert {name.removeprefix(NAMESPACE) for name in called} >= set(OPS) - {"linear", "linear_argmax", "decoder_step"}


def test_an_eager_call_is_no_operator():
    """Eager ops don't pay for the dispatcher: nothing of theirs is seen by the profiler."""
    call = CALLS["layer_norm"]("cpu")
    with torch.profiler.profile() as profile:
        run(call)
    assert not [event for event in profile.events() if event.name.startswith(NAMESPACE)]


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_graph_break_it_equals_eager_bit_for_bit(name, device):
    call = CALLS[name](device)

    def function(**arguments):
        outputs = call.function(**arguments)
        return outputs * 2.0 if torch.is_tensor(outputs) else tuple(x * 2.0 for x in outputs)

    assert_equal(run(call, torch.compile(function, backend="aot_eager", fullgraph=True)), run(call, function))
    assert graphs() == 1


def test_dropout_draws_the_seeds_that_eager_draws():
    x = normal(4, 64)

    def twice(x):
        return kernels.add_layer_norm(kernels.add_layer_norm(x, x, dropout_p=0.5), x, dropout_p=0.5)

    torch.manual_seed(5)
    expected = twice(x), twice(x)
    torch.manual_seed(5)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert_equal((compiled(x), compiled(x)), expected)
    assert not torch.equal(*expected)


def test_other_sizes_compile_nothing_new():
    """The first call is compiled for its sizes, the second for any; then nothing more is, for twenty others."""

    def function(x, residual, k_lengths, tokens, table, weight):
        x = kernels.add_layer_norm(x, residual, weight) + embedding(tokens, table, padding_idx=0)
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return attention(heads, heads, heads, k_lengths=k_lengths, causal="top_left")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for index in range(20):
        batch, length = (2 + index, 3 + index * 7 % 20)
        x, residual = normal(batch, length, 16).requires_grad_(), normal(batch, length, 16)
        tokens, k_lengths = torch.randint(11, (batch, length)), torch.randint(length + 1, (batch,))
        arguments = (x, residual, k_lengths, tokens, normal(11, 16), normal(16).requires_grad_())
        assert_equal(compiled(*arguments), function(*arguments))
        compiled(*arguments).sum().backward()
        assert graphs() <= 2, f"call {index} compiled again"


def test_a_start_that_moves_compiles_nothing_new():
    """Decoding: start is a number that grows by one each step."""
    table, tokens = normal(11, 6), torch.randint(11, (2, 1))
    compiled = torch.compile(lambda start: embedding(tokens, table, start=start), backend="aot_eager", fullgraph=True)
    for start in range(8):
        assert_equal(compiled(start), embedding(tokens, table, start=start))
    assert graphs() <= 3  # 0, 1, any


def test_packed_offsets_are_read_when_the_graph_runs():
    """One graph for batches whose longest sequences differ."""
    call = CALLS["attention_packed"]("cpu")

    def function(q_offsets, k_offsets):
        return attention(**call.tensors, q_offsets=q_offsets, k_offsets=k_offsets, causal="bottom_right")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for q_offsets, k_offsets in (([0, 2, 5], [0, 3, 7]), ([0, 0, 4], [0, 9, 9]), ([0, 5, 5], [0, 1, 8])):
        offsets = torch.tensor(q_offsets), torch.tensor(k_offsets)
        assert_equal(compiled(*offsets), function(*offsets))
    assert graphs() == 1


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor_gives_what_eager_gives(device):
    def function(table, weight, x_bias):
        x = embedding(tokens, table) + 1.0
        x = kernels.add_layer_norm(kernels.bias_act(x * 2, x_bias), x, weight, x_bias=x_bias, dropout_p=0.5, seed=one)
        heads = x.unflatten(-1, (2, 12)).transpose(1, 2)
        out, lse = kernels.attention_with_lse(heads, heads, heads, k_lengths=lengths, dropout_p=0.5, seed=one)
        weights = kernels.attention_weights(heads, heads, lse, k_lengths=lengths)
        x = (out + weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
        return kernels.cross_entropy(kernels.rms_norm(x) @ table.mT, tokens, label_smoothing=0.1)

    tokens, lengths, one = torch.randint(11, (3, 5)).to(device), torch.tensor([5, 2, 0]).to(device), seed(device)
    tensors = {"table": normal(11, 24, device=device), "weight": normal(24, device=device)}
    tensors["x_bias"] = normal(24, device=device)
    compiled = run_with_gradients(torch.compile(function, fullgraph=True), tensors)
    torch.testing.assert_close(compiled, run_with_gradients(function, tensors))
    assert graphs() == 1


# ---------------------------------------------------------------- torch.export


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9's own, when it loads
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_takes_other_sizes_after_saving_and_loading(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.weight = torch.nn.Parameter(normal(11, 16)), torch.nn.Parameter(normal(16))

        def forward(self, tokens, lengths):
            x = kernels.rms_norm(embedding(tokens, self.table), self.weight)
            heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
            return attention(heads, heads, heads, k_lengths=lengths)

    model = Model()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(
        model,
        (torch.randint(11, (2, 5)), torch.tensor([5, 3])),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}),
        strict=strict,
    )
    nodes = [node.target for node in program.graph.nodes if str(node.target).startswith("fused_transformer.")]
    ops = torch.ops.fused_transformer
    assert nodes == [ops.embedding.default, ops.layer_norm.default, ops.attention.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    tokens, lengths = torch.randint(11, (4, 9)), torch.tensor([9, 0, 4, 1])
    assert_equal(loaded(tokens, lengths), model(tokens, lengths))


# ---------------------------------------------------------------- errors and backends


@pytest.mark.parametrize(
    ("error", "sentence", "function"),
    [
        (ValueError, "k_lengths must be between 0 and 6, got 7 ... 7", lambda x: attention(x, x, x, k_lengths=n + 7)),
        (ValueError, "q_offsets must start at 0", lambda x: attention(x[0], x[0], x[0], q_offsets=n + 1)),
        (IndexError, "tokens holds 11 at index ", lambda x: embedding(n + 11, x[0, 0])),
        (ValueError, "start must not be negative, got -1", lambda x: embedding(n, x[0, 0], start=n[0] - 1)),
    ],
)
def test_what_is_wrong_with_numbers_is_said_when_the_graph_runs(error, sentence, function):
    with pytest.raises(error, match=sentence):
        torch.compile(function, backend="aot_eager", fullgraph=True)(normal(2, 3, 6, 8))


n = torch.zeros(2, dtype=torch.int64)


def test_what_is_wrong_with_shapes_is_said_when_it_is_traced():
    x, other = normal(2, 3, 6, 8), normal(2, 3, 5, 8)
    compiled = torch.compile(lambda x, y: attention(x, x, y), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="k and v must have the same shape, got "):
        compiled(x, other)
    compiled = torch.compile(lambda x: kernels.layer_norm(x, eps=-1.0), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="eps must be at least 0"):
        compiled(x)


def test_use_backend_acts_when_a_graph_runs(monkeypatch):
    from fused_transformer.kernels.layer_norm import reference

    ran = []
    forward, backward = reference.forward, reference.backward
    monkeypatch.setattr(reference, "forward", lambda *args: (ran.append("forward"), forward(*args))[1])
    monkeypatch.setattr(reference, "backward", lambda *args: (ran.append("backward"), backward(*args))[1])
    x = normal(3, 24).requires_grad_()
    compiled = torch.compile(lambda x: kernels.layer_norm(x), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert not ran
    with use_backend("reference"):
        y = compiled(x)
    assert ran == ["forward"]
    y.sum().backward()  # the node of the gradient is outside of the block
    assert ran == ["forward"]
    with use_backend("reference"):
        compiled(x).sum().backward()
    assert ran == ["forward", "forward", "backward"]
    assert graphs() == 1
    with pytest.raises(NotImplementedError, match="cuda"), use_backend("cuda"):
        compiled(x)


def test_use_backend_inside_a_compiled_function_is_a_graph_break():
    def function(x):
        with use_backend("reference"):
            return kernels.layer_norm(x * 2)

    x = normal(3, 24)
    assert_equal(torch.compile(function, backend="aot_eager")(x), function(x))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="put it around the compiled call"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def test_double_gradients_are_refused():
    for name in DIFFERENTIABLE:
        call = CALLS[name]("cpu")
        tensors = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in call.tensors.items()}
        leaves = [x for x in tensors.values() if x.requires_grad]
        with Watching():
            outputs = call.run(**tensors)
            out = outputs if torch.is_tensor(outputs) else outputs[0]
            gradient, *_ = torch.autograd.grad(out.square().sum(), leaves, create_graph=True, allow_unused=True)
            with pytest.raises(NotImplementedError, match="once differentiable"):
                gradient.sum().backward()
