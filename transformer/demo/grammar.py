"""Sentences of a small grammar with their translations.

Three kinds:

    plain    The tired cat crossed a street          Le chat fatigué a traversé une rue
    it       ... because it was too tired / wide     ... parce qu'il était trop fatigué / qu'elle était trop large
    people   je suis étudiant                        i am a student

*it* is whichever noun the adjective can be said of, and French needs to know: il or elle, and the adjective's form,
follow that noun's gender. The language of a sentence says which way it is translated.

Source of the tutorial's sentences: Alammar, *The Illustrated Transformer*.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from fused_transformer.demo.lexicon import (
    ADVERBS,
    ANIMALS,
    DEGREES,
    DESCRIBING,
    OBJECTS,
    PEOPLE,
    PLAIN,
    PRONOUNS,
    VERBS,
    Adjective,
    Noun,
    Verb,
)

VOWELS = "aeiouyâàéèêôœ"


class Sentence(NamedTuple):
    """A sentence and its translation.

    words: the two it is held out by: animal and object, or pronoun and profession.
    contrast: of an *it* sentence, whether its two nouns differ in gender, so that only the right one gives the right
        French.
    """

    source: str
    target: str
    kind: str
    words: tuple[str, str]
    contrast: bool = False


def _plain(choose: random.Random) -> Sentence:
    animal, verb = choose.choice(ANIMALS), choose.choice(VERBS)
    thing = choose.choice(OBJECTS[verb.kind])
    past, negative = choose.random() < 0.5, choose.random() < 0.4
    phrases = []
    for noun, denied in ((animal, False), (thing, negative)):
        adjective = choose.choice([*DESCRIBING[noun.kind], *PLAIN]) if choose.random() < 0.6 else None
        phrases.append(_noun_phrase(noun, adjective, choose.random() < 0.6, denied))
    (subject, sujet), (object_, objet) = phrases
    english, french = _predicate(verb, past, negative)
    source, target = f"{subject} {english} {object_}", f"{sujet} {french} {objet}"
    return Sentence(_capital(source), _capital(target), "plain", (animal.english, thing.english))


def _it(choose: random.Random) -> Sentence:
    animal, verb = choose.choice(ANIMALS), choose.choice(VERBS)
    thing = choose.choice(OBJECTS[verb.kind])
    it = choose.choice([animal, thing])
    beside = [choose.choice(PLAIN) if choose.random() < 0.4 else None for _ in range(2)]
    adjective, degree = choose.choice(DESCRIBING[it.kind]), choose.choice(list(DEGREES))
    return _because(animal, verb, thing, it, adjective, degree, choose.random() < 0.7, beside)


def _because(
    animal: Noun,
    verb: Verb,
    thing: Noun,
    it: Noun,
    adjective: Adjective,
    degree: str = "too",
    past: bool = True,
    beside: list[Adjective | None] | None = None,
) -> Sentence:
    """ "The ANIMAL didn't VERB the THING because it was DEGREE ADJECTIVE"; `beside`: adjectives of the two nouns."""
    subject, sujet = _noun_phrase(animal, beside[0] if beside else None)
    object_, objet = _noun_phrase(thing, beside[1] if beside else None)
    english, french = _predicate(verb, past, negative=True)
    source = f"{subject} {english} {object_} because it {'was' if past else 'is'} {degree} {adjective.english}"
    because = _elide("que", f"{'elle' if it.feminine else 'il'} {'était' if past else 'est'}")
    target = f"{sujet} {french} {objet} parce {because} {DEGREES[degree]} {adjective.french[it.feminine]}"
    contrast = animal.feminine != thing.feminine
    return Sentence(_capital(source), _capital(target), "it", (animal.english, thing.english), contrast)


def _people(choose: random.Random) -> Sentence:
    pronoun, person = choose.choice(PRONOUNS), choose.choice(PEOPLE)
    feminine = choose.random() < 0.5 if pronoun.feminine is None else pronoun.feminine
    present, negative = choose.random() < 0.7, choose.random() < 0.3
    adverb = None if negative else choose.choice([None, *ADVERBS])

    being = pronoun.present if present else pronoun.imperfect
    somebody = person.french[feminine] + ("s" if pronoun.plural else "")
    if negative:
        source = f"{pronoun.french} {_elide('ne', being)} pas {somebody}"
    else:
        start = _elide("je", being) if pronoun.french == "je" else f"{pronoun.french} {being}"
        source = " ".join([start, *([adverb] if adverb else []), somebody])

    between = "not " if negative else f"{ADVERBS[adverb]} " if adverb else ""
    being = pronoun.english_present if present else pronoun.english_past
    somebody = f"{person.english}s" if pronoun.plural else _an(person.english)
    return Sentence(
        source, f"{pronoun.english} {being} {between}{somebody}", "people", (pronoun.french, person.english)
    )


def _noun_phrase(
    noun: Noun, adjective: Adjective | None, definite: bool = True, denied: bool = False
) -> tuple[str, str]:
    """ "a big cat", "un grand chat"; denied, as the object of "ne ... pas", "de grand chat"."""
    english, french = noun.english, noun.french
    if adjective is not None:
        english = f"{adjective.english} {english}"
        form = adjective.french[noun.feminine]
        french = f"{form} {french}" if adjective.before else f"{french} {form}"
    if definite:
        return f"the {english}", _elide("la" if noun.feminine else "le", french)
    return _an(english), _elide("de", french) if denied else f"{'une' if noun.feminine else 'un'} {french}"


def _predicate(verb: Verb, past: bool, negative: bool) -> tuple[str, str]:
    """The verb of a third person, as English and French have it."""
    if negative:
        english = f"{'did' if past else 'does'}n't {verb.english}"
        return english, _elide("ne", f"a pas {verb.french_participle}" if past else f"{verb.french_present} pas")
    return (verb.past, f"a {verb.french_participle}") if past else (verb.present, verb.french_present)


def _elide(word: str, following: str) -> str:
    """le, la, de, ne, je or que ahead of the following words: l'animal, n'a, qu'il."""
    return f"{word[:-1]}'{following}" if following[0] in VOWELS else f"{word} {following}"


def _an(following: str) -> str:
    return f"{'an' if following[0] in 'aeiou' else 'a'} {following}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


KINDS: dict[str, Callable[[random.Random], Sentence]] = {"plain": _plain, "it": _it, "people": _people}

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
