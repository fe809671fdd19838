"""The tree of a beam search tells what the search did: its finished hypotheses are those that generate returns."""

from __future__ import annotations

import pytest
import torch

from fused_transformer import SearchOptions, generate, show
from fused_transformer.beam_tree import TreeRecorder
from fused_transformer.search import search
from tests.transformer.models import SOURCE, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def ending(seed: int):
    """A model whose translations end, some soon and some late."""
    torch.manual_seed(seed)
    model = tiny().eval()
    with torch.no_grad():
        model.source_embedding.weight[2] *= 1.5
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"beam_size": 2}, {"patience": 1.0}, {"top_beams": 4}, {"max_length": 2}, {"no_repeat_ngram_size": 1}],
    ids=str,
)
def test_the_tree_ends_in_what_generate_returns(changes):
    finished = 0
    for seed in range(3):
        model = ending(seed)
        options = SearchOptions(**{"max_length": 12} | changes)
        found = generate(model, SOURCE, options=options)
        for row, tree in enumerate(show.trace_beams(model, SOURCE, options)):
            expected = [tokens + [2] * bool(found.finished[row, i]) for i, tokens in enumerate(found.tolist()[row])]
            scores = found.scores[row].tolist()
            assert tree.best.tokens() == expected[0] and tree.best.chosen
            ends = tree.finished()
            finished += len(ends)
            if found.finished[row, 0]:
                real = int((found.scores[row] > -torch.inf).sum())
                assert [node.tokens() for node in ends[:real]] == expected[:real]
                assert [node.score for node in ends[:real]] == pytest.approx(scores[:real], rel=1e-6)
            else:
                assert not ends and tree.best.log_prob == pytest.approx(scores[0], rel=1e-6)
            assert len(ends) <= options.finished_capacity
            for step in tree.steps[1:]:
                assert sum(node.state == "kept" for node in step) <= options.beam_size
                assert [node.log_prob for node in step] == sorted((node.log_prob for node in step), reverse=True)
                assert len({tuple(node.tokens()) for node in step}) == len(step) <= 2 * options.beam_size
            for node in tree.nodes():
                assert node in node.parent.children and node.parent.state == "kept"
                assert node.log_prob <= node.parent.log_prob + 1e-5
    assert finished or changes in ({"max_length": 2}, {"patience": 1.0})


def test_states_of_a_search_by_hand():
    """Two beams over tokens 3, 4 and eos, with probabilities of our own."""
    table = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.2]).log()
    steps = []

    def step(prefixes, sentences, parents):
        return table.expand(len(prefixes), -1)

    options = SearchOptions(beam_size=2, length_penalty=0.0)
    found = search(step, torch.tensor([2]), options, on_step=steps.append)
    recorder = TreeRecorder(1, 1, options.finished_capacity)
    for one in steps:
        recorder(one)
    (tree,) = recorder.trees(found)
    said = {tuple(node.tokens()): (node.state, round(node.log_prob, 4)) for node in tree.nodes()}
    log = [round(float(x), 4) for x in torch.tensor([0.5, 0.3, 0.2, 0.25, 0.15, 0.1, 0.1]).log()]
    assert said[(3,)] == ("kept", log[0]) and said[(2,)] == ("finished", log[1]) and said[(4,)] == ("kept", log[2])
    # 0.3 of the first step ends the search only where nothing alive can beat it: 0.5 could
    assert said[(3, 3)] == ("kept", log[3]) and said[(3, 2)] == ("finished", log[4])
    assert tree.best.tokens() == [2] == [*found.tolist()[0][0], 2] and tree.root.chosen
    assert [tuple(node.tokens()) for node in tree.finished()] == [(2,), (3, 2)]


def test_steps_that_are_written_to_change_no_search():
    def spoil(step):
        for x in step:
            x.zero_()

    model = ending(0)
    assert generate(model, SOURCE).tolist() == generate(model, SOURCE, on_step=spoil).tolist()


def test_without_a_tracer_nothing_changes_and_other_searches_have_no_tree():
    model = ending(0)
    with pytest.raises(ValueError, match="beam_size must be above 1, and num_samples 0"):
        show.trace_beams(model, SOURCE, beam_size=1)
    with pytest.raises(ValueError, match="beam_size must be above 1, and num_samples 0"):
        show.trace_beams(model, SOURCE, num_samples=2)
    plain, traced = generate(model, SOURCE), generate(model, SOURCE, on_step=lambda step: None)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_the_picture_names_every_hypothesis():
    pytest.importorskip("matplotlib")
    (tree,) = show.trace_beams(ending(1), SOURCE[:1], max_length=5)
    picture = show.beam(tree, labels=lambda tokens: [f"t{token}" for token in tokens])
    svg = picture.to_bytes("svg").decode()
    assert all(f">t{node.token}<" in svg for node in tree.nodes())
    assert svg.count("score ") == sum(node.score is not None for node in tree.nodes())
    assert f"{len(tree.nodes('dropped'))} dropped" in picture.alternative
    fewer = show.beam(tree, dropped=False).to_bytes("svg").decode()
    assert len(fewer) < len(svg) and ">dropped<" in svg and ">dropped<" not in fewer
    with pytest.raises(TypeError, match=r"of a list take one: show.beam\(trees\[0\]\)"):
        show.beam([tree])
