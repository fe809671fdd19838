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
    assert cli_demo.main(["--show", str(tmp_path / "pictures")]) == 0
    printed = capsys.readouterr().out
    files = ("it.svg", "tired.html", "wide.html", "distributions.svg")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {*files}
    assert "What *it* stands for:" in printed and all(str(tmp_path / "pictures" / name) in printed for name in files)
    svg = (tmp_path / "pictures" / "it.svg").read_text(encoding="utf-8")
    assert svg.count(">▁street<") >= 2 and ">▁tired<" in svg and ">▁wide<" in svg
