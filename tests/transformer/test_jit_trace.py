"""torch.jit.trace: an op is a node of the graph, which holds for other batches, lengths and masks than those traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_transformer as ours
from fused_transformer import nn as ours_nn
from tests.inputs import normal
from tests.kernels.calls import CALLS
from tests.transformer.models import SOURCE, TARGET, tiny
from tests.transformer.nn_cases import B, E, H, L, S, causal, make, padding

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of checks, which hold for the sizes traced
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]
MODES = pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])


def traced(module: nn.Module, *inputs: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(module, inputs, check_trace=False)


def prepared(module: nn.Module, mode: str) -> torch.autograd.grad_mode.set_grad_enabled:
    module.train(mode == "train")
    return torch.set_grad_enabled(mode != "no_grad")


class WithMasks(nn.Module):
    """Masks as positional arguments, which is how torch.jit.trace takes inputs."""

    def __init__(self, module: nn.Module, *masks: str):
        super().__init__()
        self.module, self.masks = module, masks

    def forward(self, *inputs: Tensor):
        count = len(inputs) - len(self.masks)
        return self.module(*inputs[:count], **dict(zip(self.masks, inputs[count:], strict=True)))


@MODES
@pytest.mark.parametrize("kind", ["encoder_layer", "encoder", "decoder_layer", "decoder", "transformer"])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_and_stacks(kind, mode, masked):
    module = make(ours_nn, kind)
    two = kind not in ("encoder_layer", "encoder")

    def arguments(batch: int, length: int, size: int) -> list[Tensor]:
        given = [normal(batch, length, E), normal(batch, size, E)][: 1 + two]
        if masked:
            given.append(padding(*range(1, batch + 1), size=given[-1].shape[1]))
        return given

    if masked:
        hides = {"decoder_layer": "memory", "decoder": "memory", "transformer": "tgt"}.get(kind, "src")
        module = WithMasks(module, f"{hides}_key_padding_mask")
    with prepared(module, mode):
        graph = traced(module, *arguments(B, L, S))
        for sizes in ((B, L, S), (2, 9, 4), (5, 3, 11)):
            inputs = arguments(*sizes)
            torch.testing.assert_close(graph(*inputs), module(*inputs))


@MODES
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_a_sequence_to_itself_and_to_another(batch_first, mode):
    module = ours.MultiheadAttention(E, H, batch_first=batch_first)
    alone = WithMasks(module)
    alone.forward = lambda x: module(x, x, x)  # one tensor three times is the short way

    def sequences(batch: int, *lengths: int) -> list[Tensor]:
        return [normal(*((batch, n) if batch_first else (n, batch)), E) for n in lengths]

    with prepared(module, mode):
        itself, other = traced(alone, *sequences(B, L)), traced(module, *sequences(B, L, S, S))
        (x,), three = sequences(4, 5), sequences(2, 5, 6, 6)
        torch.testing.assert_close(itself(x), module(x, x, x))
        torch.testing.assert_close(other(*three), module(*three))


@pytest.mark.parametrize("what", ["norm", "encoder_layer", "decoder_layer"])
def test_torchs_own_check_of_a_trace_passes(what):
    """It traces again without gradients, and compares the nodes."""
    module = (nn.Sequential(ours_nn.LayerNorm(E)) if what == "norm" else make(ours_nn, what)).eval()
    inputs = [normal(B, L, E)] + [normal(B, S, E)] * (what == "decoder_layer")
    torch.testing.assert_close(torch.jit.trace(module, tuple(inputs))(*inputs), module(*inputs))


def test_gradients_flow_through_a_graph():
    module = make(ours_nn, "encoder_layer")
    graph, x, upstream = traced(module, normal(B, L, E)), normal(2, 5, E), normal(2, 5, E)
    parameters = list(module.parameters())
    got, expected = (torch.autograd.grad(call(x), parameters, upstream) for call in (graph, module))
    torch.testing.assert_close(got, expected)


def test_a_float_mask_is_an_input_like_any_other():
    module = WithMasks(make(ours_nn, "encoder"), "mask")
    graph = traced(module, normal(B, L, E), torch.zeros(L, L))
    x = normal(2, 4, E)
    mask = torch.zeros(4, 4).masked_fill(causal(4), -torch.inf)
    torch.testing.assert_close(graph(x, mask), module(x, mask))


def test_the_papers_model():
    model = tiny().eval()
    graph = traced(model, SOURCE, TARGET)
    torch.testing.assert_close(graph(SOURCE[:1, :3], TARGET[:1, :2]), model(SOURCE[:1, :3], TARGET[:1, :2]))


@pytest.mark.parametrize("name", CALLS)
def test_an_op_is_a_node(name):
    call = CALLS[name]("cpu")
    names, tensors = call.tensors.keys(), tuple(call.tensors.values())
    graph = torch.jit.trace(lambda *given: call.run(**dict(zip(names, given, strict=True))), tensors, check_trace=False)
    assert "fused_transformer::" in str(graph.graph)
    for _ in range(2):
        torch.testing.assert_close(graph(*tensors), call.run())
