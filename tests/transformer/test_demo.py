"""The demo: its grammar, what it holds out, and a run that is cut short."""

from __future__ import annotations

import io
import random
import sys

import pytest
import torch

from fused_transformer import cli_demo, cli_translate, demo
from fused_transformer.checkpoint import load_model
from fused_transformer.demo import phrases
from fused_transformer.demo.corpus import TESTED, make_text
from fused_transformer.demo.grammar import KINDS
from fused_transformer.demo.lexicon import ANIMALS, DESCRIBING, FOODS, PLACES, PLAIN, RIVALS, VERBS

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 40
NOUNS = {noun.english: noun for noun in (*ANIMALS, *PLACES, *FOODS)}


@pytest.fixture(scope="module")
def result():
    torch.set_num_threads(1)
    return demo.run(steps=STEPS)


@pytest.fixture(scope="module")
def drawn():
    """Some thousand sentences of each kind: source to target."""
    choose = random.Random(3)
    return {
        kind: {one.source: one.target for one in (draw(choose) for _ in range(8000))} for kind, draw in KINDS.items()
    }


@pytest.mark.parametrize(
    ("noun", "adjective", "options", "expected"),
    [
        ("street", None, {}, ("the street", "la rue")),
        ("animal", None, {}, ("the animal", "l'animal")),
        ("animal", "big", {}, ("the big animal", "le grand animal")),
        ("orange", "white", {}, ("the white orange", "l'orange blanche")),
        ("orange", None, {"definite": False}, ("an orange", "une orange")),
        ("cake", None, {"definite": False}, ("a cake", "un gâteau")),
        ("cake", None, {"definite": False, "denied": True}, ("a cake", "de gâteau")),
        ("orange", None, {"definite": False, "denied": True}, ("an orange", "d'orange")),
        ("orange", "bad", {"definite": False, "denied": True}, ("a bad orange", "de mauvaise orange")),
        ("cake", None, {"denied": True}, ("the cake", "le gâteau")),
    ],
)
def test_noun_phrases(noun, adjective, options, expected):
    chosen = next((one for one in PLAIN if one.english == adjective), None)
    assert phrases.noun_phrase(NOUNS[noun], chosen, **options) == expected


def test_verbs():
    like = next(verb for verb in VERBS if verb.english == "like")
    forms = {(past, negative): phrases.predicate(like, past, negative) for past in (0, 1) for negative in (0, 1)}
    assert forms == {
        (0, 0): ("likes", "aime"),
        (0, 1): ("doesn't like", "n'aime pas"),
        (1, 0): ("liked", "a aimé"),
        (1, 1): ("didn't like", "n'a pas aimé"),
    }


def test_adjectives_stand_where_french_has_them(drawn):
    for source, target in drawn["plain"].items():
        assert ("grand" in target) == ("big" in source)
        if "big cow" in source:
            assert "grande vache" in target.lower()
        if "tired cow" in source:
            assert "vache fatiguée" in target.lower()


def test_it_is_what_the_adjective_can_be_said_of(drawn):
    said_of = {adjective.english: kind for kind, all_ in DESCRIBING.items() for adjective in all_}
    assert len(said_of) == sum(map(len, DESCRIBING.values())), "no adjective is said of two kinds"
    assert not said_of.keys() & {adjective.english for adjective in PLAIN}
    kinds = set()
    for source, target in drawn["it"].items():
        words = source.split()
        animal, thing = (NOUNS[word] for word in words if word in NOUNS)
        it = animal if said_of[words[-1]] == "animal" else thing
        kinds.add(it.kind)
        assert said_of[words[-1]] == it.kind
        assert (" qu'elle " in target, " qu'il " in target) == (it.feminine, not it.feminine)
        forms = next(a.french for a in DESCRIBING[it.kind] if a.english == words[-1])
        assert target.split()[-1] == forms[it.feminine]
    assert kinds == {"animal", "place", "food"}


def test_of_two_animals_adjective_and_negation_tell_which_one_is_meant(drawn):
    able = {one.english for _, one, _ in RIVALS}
    assert not able & {one.english for *_, one in RIVALS}, "no adjective says both"
    seen = set()
    for source, target in drawn["rivals"].items():
        words = source.split()
        subject, object_ = (NOUNS[word] for word in words if word in NOUNS)
        negative, can = bool({"didn't", "doesn't"} & {*words}), words[-1] in able
        it = object_ if negative == can else subject
        seen.add((negative, can))
        assert (" qu'elle " in target, " qu'il " in target) == (it.feminine, not it.feminine)
        assert (" was " in source) == (" était " in target) != (" est " in target)
        forms = next(one.french for *_, x, y in RIVALS for one in (x, y) if one.english == words[-1])
        assert target.split()[-1] == forms[it.feminine]
    assert len(seen) == 4


def test_what_is_wanted_is_the_thing(drawn):
    for source, target in drawn["wanted"].items():
        _, thing, _ = (NOUNS[word] for word in source.split() if word in NOUNS)
        assert source.endswith(" it") and target.split()[-2] == ("la" if thing.feminine else "le")
        assert thing.kind in ("place", "food")


def test_french_pronouns_have_their_english(drawn):
    assert drawn["people"]["je suis étudiant"] == "i am a student"
    assert drawn["people"]["elles sont actrices"] == "they are actors"
    for source, target in drawn["people"].items():
        assert (" pas " in source) == (" not " in target)
        assert (" a " in target or " an " in target) != target.endswith("s")
        assert not any(f" a {vowel}" in target for vowel in "aeiou")


def test_every_word_has_no_two_meanings():
    """Else no model could be right."""
    text = make_text(5)
    everything = [*text.training, *(one for kind in text.held_out.values() for one in kind)]
    meanings: dict[str, set[str]] = {}
    for one in everything:
        meanings.setdefault(one.source, set()).add(one.target)
    assert all(len(targets) == 1 for targets in meanings.values())


@pytest.mark.parametrize("seed", range(1, 4))
def test_what_is_tested_is_never_trained_on(seed):
    text = make_text(seed)
    assert len(text.training) == len({one.source for one in text.training}) == 8000
    trained = {(one.kind == "people", *one.words) for one in text.training}
    sources = {one.source for one in text.training}
    for kind, sentences in text.held_out.items():
        own = [one for one in demo.TUTORIAL if one.kind == kind]
        assert 150 < len({one.source for one in sentences}) == len(sentences) <= TESTED + len(own)
        assert sentences[: len(own)] == own
        for one in sentences:
            assert (one.kind == "people", *one.words) not in trained and one.source not in sources
    assert all(one.contrast for kind in ("it", "rivals") for one in text.held_out[kind])
    assert make_text(seed) == text


def test_every_word_of_the_held_out_sentences_is_known():
    text = make_text(1)
    known = {word for one in text.training for word in (*one.source.split(), *one.target.split())}
    for one in (one for sentences in text.held_out.values() for one in sentences):
        assert {*one.source.split(), *one.target.split()} <= known


def test_a_run_learns_and_says_what_came_of_it(result):
    assert (result.steps, result.finished) == (STEPS, True)
    targets, before, after = result.outputs[1:]
    assert result.tokenizer.decode([targets.tolist()]) == ["i am a student"] and targets[-1] == 2
    assert before.shape == after.shape == (5, len(result.tokenizer))
    ones = torch.ones(5)
    torch.testing.assert_close(before.sum(1), ones)
    torch.testing.assert_close(after.sum(1), ones)
    chosen = torch.arange(5), targets
    assert after[chosen].log().mean() > before[chosen].log().mean() + 1, "it learned"
    for kind, score in result.scores.items():
        assert score.total == len(result.text.held_out[kind]) and score.right + len(score.wrong) == score.total
        for sentence, translation in score.wrong:
            assert translation != sentence.target
    rights = sum(score.right for score in result.scores.values())
    assert result.accuracy == rights / sum(score.total for score in result.scores.values()) < 0.9, "after 40 steps"
    assert [sentence for sentence, _ in result.tutorial] == list(demo.TUTORIAL)


def test_the_report_has_the_numbers(result):
    lines = cli_demo.report(result)
    table = result.outputs.table(result.tokenizer).splitlines()
    assert table[0].split() == ["i", "am", "a", "student", "<eos>", "others"]
    assert len(table) == 1 + 3 * 5
    assert table[1].split() == ["i", "target", "1.00", *["0.00"] * 5]
    for row, step in ((2, result.outputs.before[0]), (3, result.outputs.after[0])):
        shown = [float(x) for x in table[row].split()[-6:]]
        for number, token in zip(shown, result.outputs.targets.tolist(), strict=False):
            assert abs(number - float(step[token])) < 0.006
        assert abs(sum(shown) - 1.0) < 0.04
    for score in result.scores.values():
        assert any(line.startswith(f"{score.right} of {score.total} right") for line in lines)
    sentence, translation = result.scores["it"].wrong[0]
    assert any(translation in line and sentence.target in line for line in lines)


def test_the_saved_model_translates_as_the_run_did(result, tmp_path, monkeypatch, capsysbinary):
    result.save(tmp_path / "new")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(demo.TIRED.source.encode() + b"\n")))
    assert cli_translate.main(["--model", str(tmp_path / "new"), "--threads", "1"]) == 0
    assert capsysbinary.readouterr().out.decode() == result.tutorial[0][1] + "\n"
    for name, weight in load_model(tmp_path / "new").state_dict().items():
        assert torch.equal(weight, result.model.state_dict()[name])


def test_a_seed_gives_the_same_model_and_leaves_the_callers_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(demo, "_score", lambda translator, sentences: demo.Score(len(sentences), []))
    before = torch.get_rng_state()
    first, again, other = (demo.run(seed, steps=3) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    weights = first.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in again.model.state_dict().items())
    assert first.text != other.text and not torch.equal(first.outputs.before[0, :50], other.outputs.before[0, :50])


def test_time_ends_a_run(monkeypatch):
    monkeypatch.setattr(demo, "_score", lambda translator, sentences: demo.Score(len(sentences), []))
    result = demo.run(steps=10_000, minutes=0.01)
    assert 1 <= result.steps < 1000 and not result.finished
    assert "cut short" in cli_demo.report(result)[0]


def test_refused_options(capsys):
    for arguments, message in (
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--minutes", "0"], "minutes must be positive, got 0"),
        (["--threads", "0"], "--threads must be positive, got 0"),
    ):
        assert cli_demo.main(arguments) == 1
        assert message in capsys.readouterr().err
