"""CUDA graphs: a captured call or training step gives, replayed on other numbers, what it gives when called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_transformer as ours
from tests.inputs import normal
from tests.oracle import assert_equal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

E, H, F = 64, 4, 128


def warmed_up(call) -> None:
    """A capture wants its kernels compiled and its library handles made, on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_captured_call_follows_its_inputs(need_weights, is_causal):
    module = ours.MultiheadAttention(E, H, batch_first=True).cuda().eval()
    x, hidden = normal(3, 17, E, device="cuda"), torch.zeros(3, 17, dtype=torch.bool, device="cuda")

    @torch.no_grad()
    def call():
        return module(x, x, x, key_padding_mask=hidden, need_weights=need_weights, is_causal=is_causal)

    warmed_up(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for length in (17, 9, 1):
        x.copy_(normal(3, 17, E, device="cuda"))
        hidden.copy_((torch.arange(17, device="cuda") >= length).expand(3, 17))
        graph.replay()
        expected = call()
        assert_equal(captured[0], expected[0])
        if need_weights:
            assert_equal(captured[1], expected[1])


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")  # torch's own graphs
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_graphed_layer_trains_as_the_layer_does(norm_first):
    layer = ours.nn.TransformerEncoderLayer(E, H, F, dropout=0.0, batch_first=True, norm_first=norm_first).cuda()
    twin = ours.nn.TransformerEncoderLayer(E, H, F, dropout=0.0, batch_first=True, norm_first=norm_first).cuda()
    twin.load_state_dict(layer.state_dict())
    graphed = torch.cuda.make_graphed_callables(layer, (normal(3, 17, E, device="cuda").requires_grad_(),))
    for _ in range(3):
        x, upstream = normal(3, 17, E, device="cuda"), normal(3, 17, E, device="cuda")
        results = []
        for module in (graphed, twin):
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            gradients = torch.autograd.grad(out, [leaf, *module.parameters()], upstream)
            results.append([out.detach().clone(), *(gradient.clone() for gradient in gradients)])
        assert_equal(*results)


def test_replays_draw_dropout_masks_of_their_own():
    layer = nn.Sequential(ours.EncoderLayer(E, H, F, 0.5)).cuda().train()
    x = normal(3, 17, E, device="cuda")
    warmed_up(lambda: layer(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    first = captured.detach().clone()
    graph.replay()
    assert not torch.equal(captured, first)
