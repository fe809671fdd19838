"""GraphedTransformer decodes what its Transformer does: on a CPU the steps it would capture, on a GPU the graphs."""

from __future__ import annotations

import pytest
import torch

from fused_transformer import GraphedTransformer, SearchOptions, beam_search, generate, greedy
from fused_transformer.graphed import POSITIONS
from fused_transformer.kernels import use_backend
from tests.oracle import assert_equal
from tests.transformer.models import LENGTHS, SOURCE, VARIANTS, VOCAB, tiny

STEPPING = [name for name in VARIANTS if name != "no_layers"]


def both(device, **options):
    model = tiny(**options).eval().to(device)
    return model, GraphedTransformer(model, capture=torch.device(device).type == "cuda")


def assert_same_hypotheses(got, want) -> None:
    assert_equal([got.tokens, got.lengths, got.finished], [want.tokens, want.lengths, want.finished])
    torch.testing.assert_close(got.scores, want.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", STEPPING)
def test_searches_find_the_same(variant, device):
    model, graphed = both(device, **VARIANTS[variant])
    source = SOURCE.to(device)
    for _ in range(2):  # the second time in the same workspace, on the same graphs
        assert_same_hypotheses(greedy(graphed, source), greedy(model, source))
        options = {"beam_size": 3, "top_beams": 2}
        assert_same_hypotheses(beam_search(graphed, source, **options), beam_search(model, source, **options))


def test_steps_beyond_the_first_room_and_beside_another_translation(device):
    model, graphed = both(device)
    source, lengths = SOURCE.to(device), LENGTHS.to(device)
    memory = model.encode(source)
    target = torch.randint(3, VOCAB, (3, POSITIONS + 5), device=device)
    states = graphed.start(memory, lengths), graphed.start(memory.flip(0), lengths.flip(0))
    expected = model.start(memory, lengths), model.start(memory.flip(0), lengths.flip(0))
    for tokens in target.unbind(1):
        for state, other in zip(states, expected, strict=True):
            torch.testing.assert_close(graphed.step(tokens, state), model.step(tokens, other), atol=1e-5, rtol=1e-5)


def test_a_workspace_is_used_again_whatever_it_holds(device):
    model, graphed = both(device)
    memory, lengths = model.encode(SOURCE.to(device)), LENGTHS.to(device)
    state = graphed.start(memory, lengths, beam_size=2)
    workspace = state.workspace
    workspace.cache.fill_(float("nan"))
    workspace.memory[:, :, 3:].fill_(float("nan"))  # the row that rounding up adds
    del state
    state, expected = graphed.start(memory, lengths, beam_size=2), model.start(memory, lengths, beam_size=2)
    assert state.workspace is workspace
    tokens = torch.randint(3, VOCAB, (6,), device=device)
    for rows in ([1, 0, 2, 2, 5, 4], [0, 0, 3, 2, 4, 5]):
        got, want = graphed.step(tokens, state), model.step(tokens, expected)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        for one in (state, expected):
            one.reorder(torch.tensor(rows, device=device))
    for one in (state, expected):
        one.select(torch.tensor([2, 0], device=device))
    assert state.rows == 4
    got, want = graphed.step(tokens[:4], state), model.step(tokens[:4], expected)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_another_backend_has_workspaces_of_its_own(device):
    """A graph holds the kernels that it was captured with."""
    model, graphed = both(device)
    memory, lengths = model.encode(SOURCE.to(device)), LENGTHS.to(device)
    for forced in (None, "reference", None, "reference"):
        with use_backend(forced):
            graphed.start(memory, lengths)
    assert len(graphed._idle) == 2


def test_samples_and_new_weights(device):
    model, graphed = both(device)
    options = SearchOptions(num_samples=3, seed=5, temperature=0.7)
    for _ in range(2):
        found = generate(graphed, SOURCE.to(device), options=options)
        assert_same_hypotheses(found, generate(model, SOURCE.to(device), options=options))
        with torch.no_grad():
            model.source_embedding.weight.mul_(-1.1)  # in place: the next translation sees it


def test_what_is_refused():
    model = tiny()
    with pytest.raises(TypeError, match="model must be a Transformer, got int"):
        GraphedTransformer(3)
    with pytest.raises(ValueError, match="CUDA graphs are for a CUDA device, and the model is on cpu"):
        GraphedTransformer(model)
    with pytest.raises(ValueError, match="a model without decoder layers has no steps to capture"):
        GraphedTransformer(tiny(**VARIANTS["no_layers"]))
    graphed = GraphedTransformer(model.eval(), capture=False)
    state = graphed.start(model.encode(SOURCE), LENGTHS)
    with pytest.raises(ValueError, match=r"rows must have shape \(3,\), got \(2,\)"):
        state.reorder(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="call eval"):
        GraphedTransformer(tiny().train(), capture=False).start(model.encode(SOURCE), LENGTHS)
