"""The demo's text: what is trained on, and what is kept to be translated afterwards."""

from __future__ import annotations

import random
from typing import NamedTuple

from fused_transformer.demo.grammar import KINDS, TUTORIAL
from fused_transformer.demo.lexicon import ANIMALS, FOODS, PEOPLE, PLACES, PRONOUNS, Noun, Person, Pronoun
from fused_transformer.demo.phrases import Sentence

SHARES = {"plain": 0.1, "it": 0.3, "rivals": 0.3, "wanted": 0.2, "people": 0.1}  # of the training sentences
HELD_OUT_PAIRS = 0.1
TESTED = 200  # sentences of a kind, at most
DRAWS = 5000  # to find them: of some kinds a tenth of the pairs may not make so many


class Text(NamedTuple):
    """held_out: by kind. No training sentence has both `words` of a held-out one."""

    training: list[Sentence]
    held_out: dict[str, list[Sentence]]


def make_text(seed: int, sentences: int = 8000) -> Text:
    """Draw `sentences` different training sentences, and up to 200 held-out ones of each kind beside the tutorial's.

    A tenth of the pairs of animal and object, of two animals, and of pronoun and profession, are held out, the
    tutorial's among them. Of the sentences where *it* may be either noun only those are tested whose nouns differ in
    gender: in the others the French is the same whichever it is. All words of what is tested are among the trained.
    """
    choose = random.Random(seed)
    never = {one.words for one in TUTORIAL}
    for firsts, seconds in ((ANIMALS, [*PLACES, *FOODS]), (ANIMALS, ANIMALS), (PRONOUNS, PEOPLE)):
        pairs = [(_word(first), _word(second)) for first in firsts for second in seconds]
        never |= {*choose.sample(pairs, round(HELD_OUT_PAIRS * len(pairs)))}

    training: dict[str, Sentence] = {}
    held_out = {kind: {one.source: one for one in TUTORIAL if one.kind == kind} for kind in KINDS}
    for kind, draw in KINDS.items():
        wanted = len(training) + round(SHARES[kind] * sentences)
        while len(training) < wanted:
            one = draw(choose)
            if one.words not in never:
                training.setdefault(one.source, one)
    known = {word for one in training.values() for word in _words(one)}
    for kind, draw in KINDS.items():
        tested = held_out[kind]
        enough = len(tested) + TESTED
        for one in (draw(choose) for _ in range(DRAWS)):
            right_kind = one.words in never and (kind not in ("it", "rivals") or one.contrast)
            if right_kind and len(tested) < enough and known.issuperset(_words(one)):
                tested.setdefault(one.source, one)
    return Text(list(training.values()), {kind: list(tested.values()) for kind, tested in held_out.items()})


def _words(one: Sentence) -> list[str]:
    return [*one.source.split(), *one.target.split()]


def _word(one: Noun | Person | Pronoun) -> str:
    return one.french if isinstance(one, Pronoun) else one.english
