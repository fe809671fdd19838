"""Translation in its parts: the encoder, what comes ahead of the first token, one step, and a whole beam search.

"packed" is what `translate` runs, a PackedTransformer; "unpacked" is the Transformer it was packed from, and "torch.nn"
the model of bench_model.py with the same weights, which has no cache and so computes its whole prefix at each step.
What a packed step is made of: `python -m bench.step`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import shapes
from bench.agreement import assert_close_in_norm
from bench.bench_model import BOS, build, sentences
from fused_transformer import PackedTransformer, SearchOptions, generate

PREFIX = 16  # tokens ahead of the step that is timed
BEAMS, NEW = 4, 24


def models_of(shape: shapes.Model) -> dict:
    both = build(shape, "cpu")
    unpacked = both["fused"].eval()
    return {"torch.nn": both["torch.nn"].eval(), "unpacked": unpacked, "packed": PackedTransformer(unpacked)}


def on_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("weights are packed on a CPU alone")


def close_to_double(models: dict, source: Tensor, compute) -> object:
    """A check of results against `compute` of the torch.nn model in float64."""

    def check(results) -> None:
        exact = compute(models["torch.nn"].double(), source)
        models["torch.nn"].float()
        for result in results.values():
            assert_close_in_norm({"out": result}, {"out": exact})

    return check


@pytest.mark.parametrize("shape", [shapes.MODEL_BASE], ids=str)
def bench_encoder(compare, shape, device):
    on_the_cpu(device)
    models = models_of(shape)
    source, lengths = sentences(shape, device)
    real = torch.arange(shape.length) < lengths[:, None]

    @torch.no_grad()
    def encoded(model, tokens: Tensor) -> Tensor:
        return model.encode(tokens)[real]

    @torch.no_grad()
    def ours(label: str) -> Tensor:
        return models[label].encode(source, lengths)[real]

    compare(
        {"torch.nn": lambda: encoded(models["torch.nn"], source), "unpacked": lambda: ours("unpacked"),
         "packed": lambda: ours("packed")},
        check=close_to_double(models, source, encoded),
        tokens=int(lengths.sum()),
        ours="packed",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [shapes.MODEL_BASE], ids=str)
def bench_prefill(compare, shape, device):
    """The encoder, and each decoder layer's keys and values of its output."""
    on_the_cpu(device)
    models = models_of(shape)
    source, lengths = sentences(shape, device)
    real = torch.arange(shape.length) < lengths[:, None]

    @torch.no_grad()
    def prefill(label: str) -> Tensor:
        model = models[label]
        state = model.start(model.encode(source, lengths), lengths)
        return torch.stack([x for pair in state.memory for x in pair])

    def check(results) -> None:
        packed, unpacked = (results[label].transpose(2, 3)[:, real] for label in ("packed", "unpacked"))
        torch.testing.assert_close(packed, unpacked, rtol=1e-3, atol=1e-4)

    labels = ("unpacked", "packed")
    calls = {label: lambda label=label: prefill(label) for label in labels}
    compare(calls, check=check, tokens=int(lengths.sum()), ours="packed")


@pytest.mark.parametrize("shape", [shapes.MODEL_BASE], ids=str)
def bench_step(compare, shape, device):
    """Logits of the next token behind a prefix."""
    on_the_cpu(device)
    models = models_of(shape)
    source, lengths = sentences(shape, device)
    prefix = torch.randint(3, shape.vocabulary, (shape.batch, PREFIX))
    prefix[:, 0] = BOS
    states = {}
    with torch.no_grad():
        memory = models["torch.nn"].encode(source)
        for label in ("unpacked", "packed"):
            model = models[label]
            states[label] = model.start(model.encode(source, lengths), lengths)
            for tokens in prefix[:, :-1].unbind(1):
                model.step(tokens, states[label])

    @torch.no_grad()
    def step(label: str) -> Tensor:
        model, state = models[label], states[label]
        logits = model.project(model.step(prefix[:, -1], state))
        state.length -= 1  # the next call writes the same position again
        return logits

    @torch.no_grad()
    def whole_prefix() -> Tensor:
        model = models["torch.nn"]
        return model.project(model.decode(prefix, memory, source)[:, -1])

    def exactly(model, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model.project(model.decode(prefix, model.encode(tokens), tokens)[:, -1])

    compare(
        {"torch.nn": whole_prefix, "unpacked": lambda: step("unpacked"), "packed": lambda: step("packed")},
        check=close_to_double(models, source, exactly),
        tokens=shape.batch,
        ours="packed",
    )


@pytest.mark.parametrize("shape", [shapes.MODEL_BASE], ids=str)
def bench_beam_search(compare, shape, device):
    """A whole translation of exactly NEW tokens by 4 beams."""
    on_the_cpu(device)
    models = models_of(shape)
    source, lengths = sentences(shape, device)
    eos = models["unpacked"].config.eos_idx
    options = SearchOptions(beam_size=BEAMS, max_length=NEW, suppress_tokens=(eos,))
    limits = torch.full_like(lengths, NEW)

    def translate(label: str) -> Tensor:
        return generate(models[label], source, lengths, options, max_lengths=limits).tokens[:, 0]

    def check(results) -> None:
        same = (results["packed"] == results["unpacked"]).all(1).sum()
        # Random weights leave hypotheses nearly as likely as each other, so rounding may choose.
        assert same >= shape.batch - 2, f"{int(same)} of {shape.batch} translations are the same"

    labels = ("unpacked", "packed")
    calls = {label: lambda label=label: translate(label) for label in labels}
    compare(calls, check=check, tokens=shape.batch * NEW, ours="packed")
