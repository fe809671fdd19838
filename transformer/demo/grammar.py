"""Sentences of a small grammar with their translations.

    plain    The tired cat crossed a street          Le chat fatigué a traversé une rue
    it, rivals, wanted    whose French needs to know what *it* is: see pronouns
    people   je suis étudiant                        i am a student

The language of a sentence says which way it is translated.

Source of the tutorial's sentences: Alammar, *The Illustrated Transformer*.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fused_transformer.demo import pronouns
from fused_transformer.demo.lexicon import (
    ADVERBS,
    ANIMALS,
    DESCRIBING,
    OBJECTS,
    PEOPLE,
    PLAIN,
    PRONOUNS,
    VERBS,
)
from fused_transformer.demo.phrases import Sentence, an, capital, elide, noun_phrase, predicate


def _plain(choose: random.Random) -> Sentence:
    animal, verb = choose.choice(ANIMALS), choose.choice(VERBS)
    thing = choose.choice(OBJECTS[verb.kind])
    past, negative = choose.random() < 0.5, choose.random() < 0.4
    phrases = []
    for noun, denied in ((animal, False), (thing, negative)):
        adjective = choose.choice([*DESCRIBING[noun.kind], *PLAIN]) if choose.random() < 0.6 else None
        phrases.append(noun_phrase(noun, adjective, choose.random() < 0.6, denied))
    (subject, sujet), (object_, objet) = phrases
    english, french = predicate(verb, past, negative)
    source, target = f"{subject} {english} {object_}", f"{sujet} {french} {objet}"
    return Sentence(capital(source), capital(target), "plain", (animal.english, thing.english))


def _people(choose: random.Random) -> Sentence:
    pronoun, person = choose.choice(PRONOUNS), choose.choice(PEOPLE)
    feminine = choose.random() < 0.5 if pronoun.feminine is None else pronoun.feminine
    present, negative = choose.random() < 0.7, choose.random() < 0.3
    adverb = None if negative else choose.choice([None, *ADVERBS])

    being = pronoun.present if present else pronoun.imperfect
    somebody = person.french[feminine] + ("s" if pronoun.plural else "")
    if negative:
        source = f"{pronoun.french} {elide('ne', being)} pas {somebody}"
    else:
        start = elide("je", being) if pronoun.french == "je" else f"{pronoun.french} {being}"
        source = " ".join([start, *([adverb] if adverb else []), somebody])

    between = "not " if negative else f"{ADVERBS[adverb]} " if adverb else ""
    being = pronoun.english_present if present else pronoun.english_past
    somebody = f"{person.english}s" if pronoun.plural else an(person.english)
    return Sentence(
        source, f"{pronoun.english} {being} {between}{somebody}", "people", (pronoun.french, person.english)
    )


KINDS: dict[str, Callable[[random.Random], Sentence]] = {
    "plain": _plain,
    "it": pronouns.it,
    "rivals": pronouns.rivals,
    "wanted": pronouns.wanted,
    "people": _people,
}

# Held out in any case.
TIRED = Sentence(
    "The animal didn't cross the street because it was too tired",
    "L'animal n'a pas traversé la rue parce qu'il était trop fatigué",
    "it",
    ("animal", "street"),
    contrast=True,
)
WIDE = Sentence(
    "The animal didn't cross the street because it was too wide",
    "L'animal n'a pas traversé la rue parce qu'elle était trop large",
    "it",
    ("animal", "street"),
    contrast=True,
)
STUDENT = Sentence("je suis étudiant", "i am a student", "people", ("je", "student"))
TUTORIAL = (TIRED, WIDE, STUDENT)
