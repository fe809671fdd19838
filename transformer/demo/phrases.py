"""What the demo's sentences are made of: noun phrases and predicates, in English and in French."""

from __future__ import annotations

from typing import NamedTuple

from fused_transformer.demo.lexicon import Adjective, Noun, Verb

VOWELS = "aeiouyâàéèêôœ"


class Sentence(NamedTuple):
    """A sentence and its translation.

    words: the two it is held out by: two nouns, or pronoun and profession.
    contrast: of a sentence with *it*, whether its two nouns differ in gender, so that only the right one gives the
        right French.
    """

    source: str
    target: str
    kind: str
    words: tuple[str, str]
    contrast: bool = False


def noun_phrase(
    noun: Noun, adjective: Adjective | None, definite: bool = True, denied: bool = False
) -> tuple[str, str]:
    """ "a big cat", "un grand chat"; denied, as the object of "ne ... pas", "de grand chat"."""
    english, french = noun.english, noun.french
    if adjective is not None:
        english = f"{adjective.english} {english}"
        form = adjective.french[noun.feminine]
        french = f"{form} {french}" if adjective.before else f"{french} {form}"
    if definite:
        return f"the {english}", elide("la" if noun.feminine else "le", french)
    return an(english), elide("de", french) if denied else f"{'une' if noun.feminine else 'un'} {french}"


def predicate(verb: Verb, past: bool, negative: bool) -> tuple[str, str]:
    """The verb of a third person, as English and French have it."""
    if negative:
        english = f"{'did' if past else 'does'}n't {verb.english}"
        return english, elide("ne", f"a pas {verb.french_participle}" if past else f"{verb.french_present} pas")
    return (verb.past, f"a {verb.french_participle}") if past else (verb.present, verb.french_present)


def elide(word: str, following: str) -> str:
    """le, la, de, ne, je or que ahead of the following words: l'animal, n'a, qu'il."""
    return f"{word[:-1]}'{following}" if following[0] in VOWELS else f"{word} {following}"


def an(following: str) -> str:
    return f"{'an' if following[0] in 'aeiou' else 'a'} {following}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
