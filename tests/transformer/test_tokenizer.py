"""The tokenizer: round trips, unknown characters, special tokens."""

from __future__ import annotations

import pytest

from fused_transformer.tokenizer import Tokenizer

TEXT = [
    "A little girl climbing into a wooden playhouse.",
    "Une petite fille grimpe dans une maisonnette en bois.",
    "Several men in hard hats are operating a giant pulley system.",
    "Plusieurs hommes en casque font fonctionner un système de poulies géant.",
] * 3


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return Tokenizer.learn(TEXT, 340, algorithm=request.param)


@pytest.fixture(scope="module")
def words():
    return Tokenizer.learn(TEXT, 340, algorithm="word")


def test_known_text_survives_the_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("text", ["日本語 🦊", "Ærøskøbing", "ﬁ ½ … ’", "\U0010ffff", "a\u2028b", "x\ty"])
def test_unknown_characters_survive_the_round_trip(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert min(tokens) > 3, "no unknown token"
    assert tokenizer.decode([tokens]) == [text]


def test_white_space_is_made_regular(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["  a   little  girl ", "", "   "])) == ["a little girl", "", ""]
    assert tokenizer.encode([""]) == [[]]


def test_special_tokens_have_no_text(tokenizer):
    (tokens,) = tokenizer.encode(["a little girl"])
    assert tokenizer.decode([[1, *tokens, 2, 0, 0], []]) == ["a little girl", ""]


def test_subwords_are_fewer_than_characters(tokenizer):
    assert sum(map(len, tokenizer.encode(TEXT))) < sum(map(len, TEXT)) * 0.7


def test_bytes_that_are_no_text_do_not_stop_decoding(tokenizer):
    (tokens,) = tokenizer.encode(["é日"])
    assert "\ufffd" in tokenizer.decode([tokens[:-1]])[0]


def test_whole_words_are_tokens_and_others_are_spelled(words):
    assert [len(row) for row in words.encode(TEXT)] == [len(line.split()) for line in TEXT]
    assert words.decode(words.encode(TEXT)) == TEXT
    unknown = ["little  日本 🦊 girl", "Ærø", "a l'zèbre"]
    assert all(min(row) > 3 for row in words.encode(unknown))
    assert words.decode(words.encode(unknown)) == ["little 日本 🦊 girl", "Ærø", "a l'zèbre"]
    assert Tokenizer(words.to_bytes()).encode(unknown) == words.encode(unknown)


def test_the_model_survives_as_bytes(tokenizer):
    again = Tokenizer(tokenizer.to_bytes())
    assert len(again) == len(tokenizer)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_learning_is_repeatable():
    assert Tokenizer.learn(TEXT, 330).to_bytes() == Tokenizer.learn(TEXT, 330).to_bytes()


def test_the_vocabulary_is_no_larger_than_the_text_allows():
    assert 260 < len(Tokenizer.learn(["a b a b", "b a"], 30000)) < 280
    assert len(Tokenizer.learn(TEXT, 320)) == 320


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], 300), {}, "text without a word"),
        ((["", "  "], 300), {}, "text without a word"),
        ((TEXT, 100), {}, "vocab_size 100 is too small"),
        ((TEXT, 300), {"algorithm": "words"}, "algorithm must be one of 'bpe', 'unigram', 'word', got 'words'"),
        ((TEXT, 300), {"character_coverage": 1.5}, "character_coverage must be above 0 and at most 1"),
    ],
)
def test_refused_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.learn(*arguments, **options)


@pytest.mark.parametrize("model", [b"not a model", b""])
def test_refused_models(model):
    with pytest.raises(ValueError, match="sentencepiece model"):
        Tokenizer(model)
