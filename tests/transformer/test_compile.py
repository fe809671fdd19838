"""The modules under torch.compile(fullgraph=True) and torch.export: what eager gives, in one graph for all sizes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fused_transformer as ours
from fused_transformer import nn as ours_nn
from tests.inputs import normal
from tests.oracle import assert_equal
from tests.transformer.models import PAD, SOURCE, TARGET, tiny

E, H, F = 16, 4, 32
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(5)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


# ---------------------------------------------------------------- one graph, eager's bits


class Call(NamedTuple):
    """module(*inputs, **options), the inputs by letter: x and memory m are (2, 5, E), t is packed (7, E)."""

    module: Callable[[], torch.nn.Module]
    inputs: str
    options: dict[str, Any]


def attention(**options) -> Callable[[], torch.nn.Module]:
    return lambda: ours.MultiheadAttention(E, H, 0.25, batch_first=True, **options)


def nn_layer(kind, **options):
    return kind(E, H, F, batch_first=True, **options)


PACKED = {"q_offsets": torch.tensor([0, 3, 7]), "need_weights": False, "is_causal": True}
CALLS = {
    "attention": Call(attention(), "xxx", {}),
    "attention_padded": Call(attention(), "xmm", {"key_padding_mask": PADDING, "need_weights": False}),
    "attention_biased": Call(attention(), "xmm", {"attn_mask": CAUSAL, "average_attn_weights": False}),
    "attention_added": Call(attention(add_bias_kv=True, add_zero_attn=True), "xmm", {"is_causal": True}),
    "attention_packed": Call(attention(), "ttt", PACKED),
    "encoder_layer": Call(lambda: ours.EncoderLayer(E, H, F), "x", {"key_padding_mask": PADDING}),
    "pre_norm_layer": Call(lambda: ours.EncoderLayer(E, H, F, norm_first=True, activation="gelu"), "x", {}),
    "decoder_layer": Call(lambda: ours.DecoderLayer(E, H, F), "xm", {"memory_key_padding_mask": PADDING}),
    "nn_encoder": Call(
        lambda: ours_nn.TransformerEncoder(nn_layer(ours_nn.TransformerEncoderLayer, norm_first=True), 2),
        "x",
        {"mask": CAUSAL},
    ),
    "nn_decoder": Call(
        lambda: ours_nn.TransformerDecoder(nn_layer(ours_nn.TransformerDecoderLayer), 2),
        "xm",
        {"tgt_mask": CAUSAL, "memory_key_padding_mask": PADDING},
    ),
    "nn_transformer": Call(
        lambda: ours_nn.Transformer(E, H, 1, 1, F, batch_first=True),
        "mx",
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING},
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_gives_what_eager_gives(name, training):
    make, letters, options = CALLS[name]
    module = make().train(training)
    tensors = {"x": normal(2, 5, E), "m": normal(2, 5, E), "t": normal(7, E)}
    inputs = [tensors[letter] for letter in letters]
    upstream = normal(*tensors["t" if "t" in letters else "x"].shape)

    def run(function):
        torch.manual_seed(7)  # of dropout
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs[0], list(module.parameters()), upstream)
        return [x for x in (*outputs, *gradients) if x is not None]

    assert_equal(run(compiled(module)), run(module))
    assert graphs() == 1


def shallow(**options) -> ours.Transformer:
    return tiny(num_encoder_layers=1, num_decoder_layers=1, **options)


def test_the_model_compiles_whole():
    model = shallow(dropout=0.25)
    source, target = SOURCE.clamp(min=3), TARGET.clamp(min=3)  # without padding, which eager leaves out of the work
    results = []
    for function in (compiled(model), model):
        torch.manual_seed(7)
        logits = function(source, target)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    assert_equal(*results)


def test_padding_changes_nothing_at_real_tokens():
    """Eager works on the real tokens alone where there is much padding, a graph on all: the same bits."""
    model = shallow().eval()
    real = TARGET != PAD
    assert_equal(compiled(model)(SOURCE, TARGET)[real], model(SOURCE, TARGET)[real])


@pytest.mark.slow
def test_other_batches_and_lengths_compile_nothing_new():
    model, attention_module = shallow(dropout=0.1), attention()()

    def everything(source, target, x, padding):
        return model(source, target).sum() + attention_module(x, x, x, key_padding_mask=padding)[0].sum()

    function = compiled(everything)
    for index in range(10):
        batch, length = 2 + index, 3 + index * 5 % 11
        padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))
        tokens = torch.randint(1, 31, (batch, length)), torch.randint(1, 31, (batch, length + 2))
        function(*tokens, normal(batch, length, E), padding).backward()
        assert graphs() <= 2, f"call {index} compiled again"


def test_a_decoding_step_compiles_once():
    """For its first position, then for any; and again where the cache grows."""
    model = shallow().eval()
    with torch.no_grad():
        memory = model.encode(SOURCE)
        ahead, state = model.start(memory), model.start(memory)
        step = compiled(model.step)
        for tokens in torch.randint(1, 31, (12, 3)):
            assert_equal(step(tokens, state), model.step(tokens, ahead))
    assert graphs() == 2


def test_a_swapped_model_compiles():
    model = torch.nn.Transformer(E, H, 1, 1, F, batch_first=True).eval()
    x, memory = normal(2, 5, E), normal(2, 4, E)
    expected = model(memory, x, tgt_mask=CAUSAL)
    ours.fuse(model)
    got = compiled(model)(memory, x, tgt_mask=CAUSAL)
    torch.testing.assert_close(got, expected)
    assert_equal(got, model(memory, x, tgt_mask=CAUSAL))


# ---------------------------------------------------------------- torch.export


def exported(model: torch.nn.Module, tensors: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    sizes = tuple({0: batch, 1: torch.export.Dim(f"length_{index}")} for index in range(len(tensors)))
    return torch.export.export(model, tensors, dynamic_shapes=sizes, strict=False)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.9's own, when it loads
def test_an_exported_model_takes_other_batches_and_lengths():
    model = shallow().eval()
    program = exported(model, (SOURCE, TARGET))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    source, target = torch.randint(1, 31, (4, 9)), torch.randint(1, 31, (4, 2))
    assert_equal(loaded(source, target), model(source, target))


def test_for_onnx_a_model_is_written_in_torchs_own_operators(monkeypatch):
    """What torch.onnx.export translates: no operator of ours, any batch and length, rows without keys give no NaN."""
    import torch.onnx

    model = shallow().eval()
    source, target = torch.randint(1, 31, (4, 9)), torch.randint(1, 31, (4, 2))
    source[1] = PAD
    expected = model(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = exported(model, (SOURCE, TARGET))
    assert not [node for node in program.graph.nodes if "fused_transformer" in str(node.target)]
    torch.testing.assert_close(program.module()(source, target), expected)


def test_packed_batches_are_refused_for_onnx(monkeypatch):
    import torch.onnx

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    tokens = normal(7, E)
    with pytest.raises(NotImplementedError, match="packed batches can't be exported to ONNX: pass padded tensors"):
        torch.export.export(attention()(), (tokens,) * 3, PACKED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
def test_onnxruntime_gives_what_the_model_gives(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = shallow().eval(), tmp_path / "model.onnx"
    batch, lengths = torch.export.Dim("batch"), [torch.export.Dim("s"), torch.export.Dim("t")]
    sizes = tuple({0: batch, 1: length} for length in lengths)
    torch.onnx.export(model, (SOURCE, TARGET), dynamo=True, dynamic_shapes=sizes).save(path)
    session = onnxruntime.InferenceSession(path)
    source, target = torch.randint(1, 31, (4, 9)), torch.randint(1, 31, (4, 2))
    names = [x.name for x in session.get_inputs()]
    (logits,) = session.run(None, dict(zip(names, (source.numpy(), target.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(logits), model(source, target).detach())
