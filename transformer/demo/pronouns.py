"""Sentences whose French needs to know what *it* is.

    it       The animal didn't cross the street because it was too tired / wide: the noun that this can be said of
    rivals   The cat (didn't) catch the mouse because it was too fast / slow: either could be, so both words decide
    wanted   The cat didn't cross the street because the dog wanted to see it: always the thing

il or elle, le or la, and the form of "fatigué" follow the noun's gender. With the first kind alone a model need not
find out which noun *it* is: one is an animal and the other is not, so what the adjective is said of and both genders
may be brought together anywhere. Where both are animals, and where no adjective stands by, *it* is where they meet.
"""

from __future__ import annotations

import random

from fused_transformer.demo.lexicon import (
    ANIMALS,
    DEGREES,
    DESCRIBING,
    OBJECTS,
    PLAIN,
    RIVALS,
    VERBS,
    WANTED,
    Adjective,
    Noun,
    Verb,
)
from fused_transformer.demo.phrases import Sentence, capital, elide, noun_phrase, predicate


def it(choose: random.Random) -> Sentence:
    animal, verb = choose.choice(ANIMALS), choose.choice(VERBS)
    thing = choose.choice(OBJECTS[verb.kind])
    meant, past = choose.choice([animal, thing]), choose.random() < 0.7
    clause = _clause(choose, animal, verb, thing, past, negative=True)
    adjective, degree = choose.choice(DESCRIBING[meant.kind]), choose.choice(list(DEGREES))
    return _because("it", clause, (animal, thing), meant, past, degree, adjective)


def rivals(choose: random.Random) -> Sentence:
    """Who catches is able to, who is caught is not; of who doesn't catch and isn't caught it is the other way round."""
    subject, object_ = choose.sample(ANIMALS, 2)
    verb, able, unable = choose.choice(RIVALS)
    meant, past, negative = choose.choice([subject, object_]), choose.random() < 0.7, choose.random() < 0.5
    clause = _clause(choose, subject, verb, object_, past, negative)
    adjective, degree = able if (meant is subject) != negative else unable, choose.choice(list(DEGREES))
    return _because("rivals", clause, (subject, object_), meant, past, degree, adjective)


def wanted(choose: random.Random) -> Sentence:
    animal, other, verb = choose.choice(ANIMALS), choose.choice(ANIMALS), choose.choice(VERBS)
    thing = choose.choice(OBJECTS[verb.kind])
    past = choose.random() < 0.7
    english, french = _clause(choose, animal, verb, thing, past, negative=choose.random() < 0.5)
    somebody, quelquun = noun_phrase(other, None)
    do, faire = choose.choice(WANTED[verb.kind])
    source = f"{english} because {somebody} {'wanted' if past else 'wants'} to {do} it"
    target = f"{french} parce que {quelquun} {'voulait' if past else 'veut'} {'la' if thing.feminine else 'le'} {faire}"
    return Sentence(capital(source), capital(target), "wanted", (animal.english, thing.english))


def _clause(
    choose: random.Random, subject: Noun, verb: Verb, object_: Noun, past: bool, negative: bool
) -> tuple[str, str]:
    """The first half of a sentence, its nouns with or without an adjective that could be said of anything."""
    beside = [choose.choice(PLAIN) if choose.random() < 0.3 else None for _ in range(2)]
    (somebody, sujet), (thing, objet) = noun_phrase(subject, beside[0]), noun_phrase(object_, beside[1])
    english, french = predicate(verb, past, negative)
    return f"{somebody} {english} {thing}", f"{sujet} {french} {objet}"


def _because(
    kind: str,
    clause: tuple[str, str],
    nouns: tuple[Noun, Noun],
    meant: Noun,
    past: bool,
    degree: str,
    adjective: Adjective,
) -> Sentence:
    """The clause, and "because it was DEGREE ADJECTIVE", which is said of `meant`, one of the two nouns."""
    source = f"{clause[0]} because it {'was' if past else 'is'} {degree} {adjective.english}"
    because = elide("que", f"{'elle' if meant.feminine else 'il'} {'était' if past else 'est'}")
    target = f"{clause[1]} parce {because} {DEGREES[degree]} {adjective.french[meant.feminine]}"
    first, second = nouns
    words, contrast = (first.english, second.english), first.feminine != second.feminine
    return Sentence(capital(source), capital(target), kind, words, contrast)
