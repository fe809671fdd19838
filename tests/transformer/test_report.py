"""model_report: which backend each op of a model ran on, under which module, and why not on a faster one."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fused_transformer import Transformer, TransformerConfig, fuse, model_report, reporting
from fused_transformer import nn as ours_nn
from fused_transformer.kernels import OPS, _dispatch, layer_norm, observe, use_backend
from tests.inputs import normal
from tests.transformer.fuse_cases import TOKENS, Classifier, OwnNorm
from tests.transformer.nn_cases import B, E, F, H, L, make

ON_CPU = {name for name, op in OPS.items() if not isinstance(op.module("cpu"), str)}


def fused(**options) -> Classifier:
    model = Classifier(**options).eval()
    fuse(model)
    return model


def test_every_call_with_its_module_and_backend_in_order():
    model = fused()
    report = model_report(model, TOKENS)
    layers = [
        *[("encoder.layers.0.self_attn", "attention"), *[("encoder.layers.0", "layer_norm")] * 2],
        *[("encoder.layers.1.self_attn", "attention"), *[("encoder.layers.1", "layer_norm")] * 2],
    ]
    pool = [("pool", "attention")] * 2  # the output, and its weights
    expected = [("norm", "layer_norm"), *layers, *pool, ("norm", "layer_norm"), ("rms", "layer_norm")]
    assert [(call.module, call.op) for call in report.calls] == expected
    assert {call.backend for call in report.calls} == {"cpu"}
    assert all(call.reasons == () for call in report.calls)
    assert report.calls[0].inputs == "float32 (3, 5, 24)"
    assert report.torchs == ()


def test_the_model_runs_once_as_it_is():
    model, seen = fused().train(), []
    model.register_forward_hook(lambda module, args, out: seen.append((module.training, args, out.requires_grad)))
    model_report(model, TOKENS)
    assert seen == [(True, (TOKENS,), True)]
    with torch.no_grad():
        model_report(model.eval(), tokens=TOKENS)
    assert seen[1:] == [(False, (), False)]


def test_hooked_norms_are_listed_where_they_are_called():
    model = fused()
    model.encoder.layers[0].norm1.register_forward_hook(lambda *_: None)
    calls = [(call.module, call.inputs) for call in model_report(model, TOKENS).calls]
    assert ("encoder.layers.0.norm1", "float32 (3, 5, 24)") in calls


def test_a_refusal_is_told_in_the_backends_own_sentence():
    report = model_report(fused().double(), TOKENS)
    assert {call.backend for call in report.calls} == {"reference"}
    for call in report.calls:
        ((backend, why),) = call.reasons
        assert backend == "cpu" and "float64" in why
    wide = ours_nn.MultiheadAttention(300, 1)
    x = normal(2, 3, 300)
    (call, _) = model_report(wide, x, x, x).calls
    assert (call.module, call.op, call.backend) == ("", "attention", "reference")
    assert call.reasons == (("cpu", OPS["attention"].why_not("cpu", *arguments_of(wide, x))),)


def arguments_of(module, x) -> tuple:
    """What the first op that the module calls is given."""
    seen = []
    with observe(lambda op, backend, arguments: seen.append(arguments)):
        module(x, x, x)
    return seen[0]


def test_a_forced_backend_is_the_reason():
    with use_backend("reference"):
        report = model_report(fused(), TOKENS)
    assert {call.backend for call in report.calls} == {"reference"}
    for call in report.calls:
        if call.op in ON_CPU:
            assert call.reasons == (("cpu", "use_backend('reference') forces another"),)


def test_all_faster_kernels_of_the_device_give_their_reason(monkeypatch):
    monkeypatch.setitem(reporting.KERNELS, "cpu", ("cuda", "triton", "cpu"))
    op = OPS["layer_norm"]
    (call,) = model_report(ours_nn.LayerNorm(E), normal(B, E)).calls
    assert [backend for backend, _ in call.reasons] == ["cuda", "triton"]
    seen = []
    with observe(lambda _op, _backend, arguments: seen.append(arguments)):
        layer_norm(normal(B, E))
    for backend, why in call.reasons:
        assert why == op.why_not(backend, *seen[0])


def test_backends_of_other_devices_are_no_reason():
    (call,) = model_report(ours_nn.LayerNorm(E), normal(B, E)).calls
    assert call.backend == "cpu" and call.reasons == ()


def test_modules_that_are_torchs_still_are_told():
    model = Classifier().train()
    model.norm = OwnNorm(E)
    report = model_report(model, TOKENS)
    assert report.calls == ()
    whys = {part.name: part.why for part in report.torchs}
    assert whys["encoder"] == whys["encoder.layers.0.self_attn"] == whys["rms"] == "fuse(model) makes it ours"
    assert whys["norm"] == "a subclass of torch.nn.LayerNorm, which may compute something else"
    fuse(model)
    assert [part.name for part in model_report(model, TOKENS).torchs] == ["norm"]


def test_the_papers_model():
    config = TransformerConfig(source_vocab_size=20, d_model=E, num_heads=H, d_feedforward=F)
    report = model_report(Transformer(config), TOKENS, TOKENS)
    assert [call.op for call in report.calls].count("attention") == 3 * 6
    assert [call.module for call in report.calls if call.op == "embedding"] == ["source_embedding"] * 2
    assert report.torchs == ()


def test_the_text_has_a_line_for_calls_that_differ_in_a_number_alone():
    model = ours_nn.TransformerEncoder(make(ours_nn, "encoder_layer"), 3)
    lines = str(model_report(model, normal(B, L, E))).splitlines()
    assert lines[0] == "9 calls of ops: 9 on cpu"
    assert lines[1].startswith("  layers.*.self_attn  attention   cpu  float32 (3, 4, 7, 6), ")
    assert lines[1].endswith("  × 3")
    assert lines[2] == "  layers.*            layer_norm  cpu  float32 (3, 7, 24), (3, 7, 24)  × 6"
    assert len(lines) == 3
    text = str(model_report(nn.Sequential(nn.LayerNorm(E), ours_nn.LayerNorm(E)).double(), normal(3, E).double()))
    assert "\n  1  layer_norm  reference  float64 (3, 24)\n      not cpu: x must be float32" in text
    assert "\n\ncalled, and torch's own:\n  0  LayerNorm: fuse(model) makes it ours" in text
    assert str(model_report(nn.Identity(), 1)) == "0 calls of ops"


def test_nothing_stays_behind_even_after_an_error():
    class Fails(nn.Module):
        def forward(self, x):
            layer_norm(x)
            raise KeyError("x")

    hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    before = [len(found) for found in hooks]
    with pytest.raises(KeyError):
        model_report(nn.Sequential(Fails()), normal(B, E))
    assert [len(found) for found in hooks] == before
    assert _dispatch._observer is None


def test_observers_nest_and_threads_do_not_mix():
    outer, inner = [], []
    with observe(lambda op, *_: outer.append(op.name)):
        with observe(lambda op, *_: inner.append(op.name)):
            layer_norm(normal(B, E))
        layer_norm(normal(B, E))
    assert outer == inner == ["layer_norm"]

    class Elsewhere(nn.Module):
        def forward(self, x):
            thread = threading.Thread(target=layer_norm, args=(x,))
            thread.start()
            thread.join()
            return layer_norm(x)

    assert len(model_report(Elsewhere(), normal(B, E)).calls) == 1
