"""The words of the demo's language: what each is in English and in French, and what grammar has to know of it."""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """kind: "animal", "place" or "food", which decides what may be said of it."""

    english: str
    french: str
    feminine: bool
    kind: str


class Adjective(NamedTuple):
    """french: masculine and feminine. before: it stands ahead of a French noun instead of behind it."""

    english: str
    french: tuple[str, str]
    before: bool = False


class Verb(NamedTuple):
    """What an animal does to something. kind: of the object."""

    english: str
    past: str
    present: str
    french_participle: str
    french_present: str
    kind: str


class Person(NamedTuple):
    """What somebody is. french: masculine and feminine; the plural has an s more, as in English."""

    english: str
    french: tuple[str, str]


class Pronoun(NamedTuple):
    """A French subject with its forms of être, and the English of them. feminine: None, either is possible."""

    french: str
    present: str
    imperfect: str
    english: str
    english_present: str
    english_past: str
    plural: bool
    feminine: bool | None


def _nouns(kind: str, masculine: str, feminine: str) -> list[Noun]:
    return [
        Noun(*_two(words), gender, kind)
        for gender, line in ((False, masculine), (True, feminine))
        for words in line.split(", ")
    ]


def _two(words: str) -> tuple[str, str]:
    english, french = words.split(" ")
    return english, french


def _forms(masculine: str, feminine: str | None) -> tuple[str, str]:
    """Both genders; a feminine that begins with - is an ending of the masculine, None is the same word."""
    if feminine is None:
        return masculine, masculine
    return masculine, masculine + feminine[1:] if feminine.startswith("-") else feminine


def _split(line: str) -> tuple[str, tuple[str, str]]:
    english, masculine, *feminine = line.split(" ")
    return english, _forms(masculine, feminine[0] if feminine else None)


def _adjectives(lines: str, before: bool = False) -> list[Adjective]:
    return [Adjective(*_split(line), before) for line in lines.split(", ")]


def _people(lines: str) -> list[Person]:
    return [Person(*_split(line)) for line in lines.split(", ")]


def _rivals(verb: str, adjectives: str) -> tuple[Verb, Adjective, Adjective]:
    able, unable = _adjectives(adjectives)
    english, past, present, participle, french = verb.split(" ")
    return Verb(english, past, present, participle, french, "animal"), able, unable


ANIMALS = _nouns(
    "animal",
    "animal animal, cat chat, dog chien, horse cheval, bird oiseau, rabbit lapin, fox renard, wolf loup, duck canard, "
    "monkey singe, bear ours, donkey âne",
    "cow vache, mouse souris, hen poule, goat chèvre, turtle tortue, giraffe girafe, frog grenouille, ant fourmi, "
    "spider araignée, panther panthère, lioness lionne, bee abeille",
)
PLACES = _nouns(
    "place",
    "bridge pont, field champ, desert désert, lake lac, park parc, path chemin, garden jardin, market marché, "
    "tunnel tunnel, trail sentier",
    "street rue, road route, river rivière, square place, highway autoroute, forest forêt, beach plage, "
    "valley vallée, courtyard cour, avenue avenue",
)
FOODS = _nouns(
    "food",
    "cake gâteau, cheese fromage, egg œuf, lemon citron, melon melon, sandwich sandwich",
    "apple pomme, soup soupe, pear poire, carrot carotte, tomato tomate, orange orange",
)
OBJECTS = {"place": PLACES, "food": FOODS}

# What *it* is in "because it was too ..." follows from these: no adjective is said of two kinds of things. All but the
# tutorial's tired have one form in French. Where they agree with the noun, a model looks the noun up from the adjective
# and leaves *it* alone.
DESCRIBING = {
    "animal": _adjectives("tired fatigué -e, sick malade, weak faible, shy timide"),
    "place": _adjectives("wide large, steep raide, dark sombre"),
    "food": _adjectives("sour acide, bland fade, lukewarm tiède"),
}
# These are said of everything, so only beside a noun.
PLAIN = [
    *_adjectives("red rouge, black noir -e, white blanc -he, green vert -e, strange étrange"),
    *_adjectives("big grand -e, small petit -e, pretty joli -e, bad mauvais -e", before=True),
]

VERBS = [
    Verb("cross", "crossed", "crosses", "traversé", "traverse", "place"),
    Verb("leave", "left", "leaves", "quitté", "quitte", "place"),
    Verb("like", "liked", "likes", "aimé", "aime", "place"),
    Verb("explore", "explored", "explores", "exploré", "explore", "place"),
    Verb("visit", "visited", "visits", "visité", "visite", "place"),
    Verb("eat", "ate", "eats", "mangé", "mange", "food"),
    Verb("taste", "tasted", "tastes", "goûté", "goûte", "food"),
    Verb("steal", "stole", "steals", "volé", "vole", "food"),
]
# What animals do to each other, what they are who can, and what they are who can't.
RIVALS: list[tuple[Verb, Adjective, Adjective]] = [
    _rivals("catch caught catches attrapé attrape", "fast rapide, slow lent -e"),
    _rivals("overtake overtook overtakes dépassé dépasse", "fast rapide, slow lent -e"),
    _rivals("beat beat beats battu bat", "strong fort -e, weak faible"),
    _rivals("push pushed pushes poussé pousse", "strong fort -e, weak faible"),
    _rivals("fool fooled fools trompé trompe", "clever malin maligne, stupid bête"),
]
# What somebody may want to do with a thing.
WANTED = {
    "place": [_two(words) for words in ("cross traverser", "leave quitter", "see voir", "visit visiter")],
    "food": [_two(words) for words in ("eat manger", "taste goûter", "see voir", "sell vendre")],
}
DEGREES = {"too": "trop", "very": "très", "so": "si"}

PEOPLE = _people(
    "student étudiant -e, teacher professeur -e, doctor médecin, lawyer avocat -e, actor acteur actrice, "
    "baker boulanger boulangère, singer chanteur chanteuse, nurse infirmier infirmière, journalist journaliste, "
    "painter peintre, cook cuisinier cuisinière, dancer danseur danseuse, musician musicien -ne, "
    "engineer ingénieur -e, writer écrivain -e, farmer fermier fermière"
)
PRONOUNS = [
    Pronoun("je", "suis", "étais", "i", "am", "was", False, None),
    Pronoun("tu", "es", "étais", "you", "are", "were", False, None),
    Pronoun("il", "est", "était", "he", "is", "was", False, False),
    Pronoun("elle", "est", "était", "she", "is", "was", False, True),
    Pronoun("nous", "sommes", "étions", "we", "are", "were", True, None),
    Pronoun("vous", "êtes", "étiez", "you", "are", "were", True, None),
    Pronoun("ils", "sont", "étaient", "they", "are", "were", True, False),
    Pronoun("elles", "sont", "étaient", "they", "are", "were", True, True),
]
ADVERBS = {"aussi": "also", "encore": "still", "déjà": "already"}
