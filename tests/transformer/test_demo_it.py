"""The heads that tell what *it* stands for: those of a planted model are found, and what is counted is so."""

from __future__ import annotations

import pytest
import torch

from fused_transformer import attention_maps, cli_demo, demo
from fused_transformer.demo import corpus, it
from fused_transformer.demo.lexicon import DESCRIBING
from tests.transformer.show_cases import made_up

pytestmark = pytest.mark.usefixtures("one_thread")
ANIMALS = {adjective.english for adjective in DESCRIBING["animal"]}


@pytest.fixture(scope="module")
def result():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TESTED", 12)  # an untrained model's translations are long
        return demo.run(steps=5)


def places(sentence):
    """Of the source's words: the query *it*, the adjective, the noun that *it* is, and the other noun."""
    words = sentence.source.split()
    animal, thing = (words.index(word) for word in sentence.words)
    return words.index("it"), len(words) - 1, *((animal, thing) if words[-1] in ANIMALS else (thing, animal))


@pytest.mark.parametrize("planted", ["it", "adjective", "pronoun"])
def test_planted_heads_are_found(result, monkeypatch, planted):
    """Head 3 knows the animals, and head 1 the other nouns; or head 3 all of them."""

    def maps_of(result, sentences):
        maps = []
        for sentence in sentences:
            target = ["<s>", *sentence.target.split(), "</s>"]
            one = made_up([*sentence.source.split(), "</s>"], target, layers=2, heads=4)
            query, adjective, right, wrong = places(sentence)
            is_animal = sentence.source.split()[-1] in ANIMALS
            pronoun = next(i for i, word in enumerate(target[1:]) if word in ("qu'il", "qu'elle"))
            row = {"it": query, "adjective": adjective, "pronoun": pronoun}[planted]
            kind = one.encoder_decoder if planted == "pronoun" else one.encoder_self
            for weights in (one.encoder_decoder, one.encoder_self):
                weights[:, :, :, [right, wrong]] = 0.02  # no head knows anything
            kind[1, 3, row, right] = 0.8 if is_animal or planted == "it" else 0.1
            kind[1, 3, row, wrong] = 0.1
            kind[1, 1, row, right] = 0.1 if is_animal or planted == "it" else 0.7
            kind[1, 1, row, wrong] = 0.1
            maps.append(one)
        return maps

    monkeypatch.setattr(it, "_maps", maps_of)
    found = it.it_heads(result)
    assert found.query == planted and found.layer == 1
    assert found.attention == ("encoder_decoder" if planted == "pronoun" else "encoder_self")
    assert found.heads == ((3,) if planted == "it" else (1, 3))
    assert found.right == found.total == len(result.text.held_out["it"])
    assert found.tired == pytest.approx((0.8, 0.1) if planted == "it" else (0.9, 0.2))
    assert found.wide == pytest.approx((0.8, 0.1) if planted == "it" else (0.8, 0.2))
    tired, wide = found.views()
    labels = {"it": ("it", "it"), "adjective": ("tired", "wide"), "pronoun": ("qu'il", "qu'elle")}[planted]
    assert tuple(view.maps.rows(view.kind)[view.token] for view in (tired, wide)) == labels
    assert tired.title == demo.TIRED.source and wide.heads == found.heads


def heads(query="it", right=200, total=200, tired=(0.9, 0.0), wide=(0.9, 0.0)):
    return it.ItHeads("encoder_self", query, 2, (0,), right, total, tired, wide, (None, None))


@pytest.mark.parametrize(
    ("found", "clear"),
    [
        (heads(), True),
        (heads(right=191), True),
        (heads(right=189), False),
        (heads(tired=(0.9, 0.45)), False),
        (heads(wide=(0.5, 0.0)), False),
    ],
)
def test_a_link_is_clear(found, clear):
    assert found.clear is clear


def asked_of(found_by_seed, monkeypatch):
    """first_that_links from seed 3, the models being their seeds, and what `it_heads` says of each of them."""

    def it_heads(result, queries=("any",)):
        return found_by_seed[result]["it" if queries == ("it",) else "any"]

    monkeypatch.setattr(it, "it_heads", it_heads)
    return it.first_that_links(lambda seed: seed, 3, len(found_by_seed))


def test_seeds_are_tried_until_one_links(monkeypatch):
    clear, not_clear = heads(), heads(right=100)
    found = {seed: {"it": one, "any": heads("adjective")} for seed, one in ((3, not_clear), (4, clear), (5, clear))}
    assert asked_of(found, monkeypatch) == (4, clear, [3, 4])


def test_if_no_seed_links_the_best_of_any_word_is_shown(monkeypatch):
    best = heads("adjective", right=190)
    found = {seed: {"it": heads(right=100), "any": heads("pronoun", right=150)} for seed in (3, 4, 5)}
    found[4]["any"] = best
    assert asked_of(found, monkeypatch) == (4, best, [3, 4, 5])


def test_no_tries_are_refused():
    with pytest.raises(ValueError, match="tries must be at least 1, got 0"):
        it.first_that_links(lambda seed: seed, 1, 0)


def test_what_is_counted_is_the_models(result):
    found = it.it_heads(result)
    config, encode = result.model.config, result.tokenizer.encode
    right = 0
    sentences = [demo.TIRED, demo.WIDE, *result.text.held_out["it"]]
    for number, sentence in enumerate(dict.fromkeys(sentences)):
        ((source), (target)) = encode([sentence.source, sentence.target])
        maps = attention_maps(
            result.model,
            torch.tensor([*source, config.eos_idx]),
            torch.tensor([config.bos_idx, *target, config.eos_idx]),
        )
        query, adjective, noun, other = places(sentence)
        words = sentence.target.split()
        pronoun = next(i for i, word in enumerate(words) if word in ("qu'il", "qu'elle"))
        row = {"it": query, "adjective": adjective, "pronoun": pronoun}[found.query]
        weights = maps.weights(found.attention)[found.layer, list(found.heads), row].sum(0)
        right += bool(weights[noun] > weights[other])
        if number < 2:
            expected = (found.tired, found.wide)[number]
            assert expected == pytest.approx((float(weights[noun]), float(weights[other])), abs=1e-5)
    assert found.right == right and f"in {right} of {found.total} held-out sentences" in str(found)


def test_the_command_draws_them(result, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "run", lambda *_, **__: result)
    assert cli_demo.main(["--show", str(tmp_path / "pictures"), "--tries", "2"]) == 0
    printed = capsys.readouterr().out
    files = ("it.svg", "tired.html", "wide.html", "distributions.svg")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {*files}
    assert "What *it* stands for (2 models trained, seed 1 shown; no head of theirs links *it* itself" in printed
    assert all(str(tmp_path / "pictures" / name) in printed for name in files)
    svg = (tmp_path / "pictures" / "it.svg").read_text(encoding="utf-8")
    assert svg.count(">▁street<") >= 2 and ">▁tired<" in svg and ">▁wide<" in svg
