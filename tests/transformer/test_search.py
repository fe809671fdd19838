"""The options of a search, against searches written out with lists and loops, on vocabularies of a few tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_transformer.constraints import repeating
from fused_transformer.sampling import draw, mix, sentence_keys, uniforms
from fused_transformer.search import SearchOptions, search, search_beams, search_samples
from tests.transformer import search_reference
from tests.transformer.search_reference import BOS, EOS, INF

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LONGEST = 6, 7


class Tables:
    """Random logits that depend on the sentence, the position and the last two tokens; float64, so without ties."""

    def __init__(self, sentences: int, seed: int, eos_bonus: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (sentences, LONGEST + 1, VOCABULARY, VOCABULARY, VOCABULARY)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
        self.logits[..., EOS] += eos_bonus

    def step(self, prefixes, sentences, parents):
        before = prefixes[:, -2] if prefixes.shape[1] > 1 else torch.zeros_like(sentences)
        return self.logits[sentences, prefixes.shape[1] - 1, before, prefixes[:, -1]]

    def sentence(self, number: int):
        tables = self.logits[number].tolist()
        return lambda prefix: tables[len(prefix) - 1][prefix[-2] if len(prefix) > 1 else 0][prefix[-1]]


def assert_found(found, sentence: int, expected, hypotheses: int) -> None:
    for rank in range(hypotheses):
        tokens, score, finished, log_probs = expected[rank] if rank < len(expected) else ([], -INF, False, [])
        length = int(found.lengths[sentence, rank])
        assert found.tokens[sentence, rank, :length].tolist() == tokens
        assert not found.tokens[sentence, rank, length:].any(), "padding beyond the hypothesis"
        assert float(found.scores[sentence, rank]) == pytest.approx(score, rel=1e-5)
        assert bool(found.finished[sentence, rank]) == finished
        got = found.log_probs[sentence, rank].tolist()
        assert got[: len(log_probs)] == pytest.approx(log_probs, abs=1e-5)
        assert not any(got[len(log_probs) :])


CONSTRAINTS = {
    "min_length": st.integers(0, 3),
    "no_repeat_ngram_size": st.integers(0, 3),
    "suppress_tokens": st.lists(st.integers(3, VOCABULARY - 1), max_size=2, unique=True).map(tuple),
}
FORCED = st.lists(st.sampled_from([1, 3, 4, 5]), max_size=3)
LIMITS = st.integers(4, LONGEST)


@st.composite
def problems(draw_value, **strategies):
    """Tables, and for each sentence its limit and forced prefix; options with these fields."""
    sentences = draw_value(st.lists(st.tuples(LIMITS, FORCED), min_size=1, max_size=4))
    tables = Tables(len(sentences), draw_value(st.integers(0, 10**6)), draw_value(st.sampled_from([-2.0, 0.0, 2.0])))
    options = {name: draw_value(strategy) for name, strategy in (CONSTRAINTS | strategies).items()}
    return tables, [limit for limit, _ in sentences], [forced for _, forced in sentences], options


def padded(rows):
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64).view(
        len(rows), longest
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_greedy_with_every_constraint(problem):
    tables, limits, forced, fields = problem
    options = SearchOptions(beam_size=1, **fields)
    found = search(tables.step, torch.tensor(limits), options, forced=padded(forced))
    for number, limit in enumerate(limits):
        expected = search_reference.greedy(tables.sentence(number), limit, options, forced[number])
        assert_found(found, number, expected, 1)


@settings(max_examples=250, deadline=None)
@given(
    problems(
        beam_size=st.integers(2, 5),
        top_beams=st.integers(1, 2),
        length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.5]),
        penalty=st.sampled_from(["gnmt", "power"]),
        stopping=st.sampled_from([{}, {"stop_early": True}, {"stop_early": False}]
                                 + [{"patience": patience} for patience in (0.5, 1.0, 1.5, 3.0)]),
    )
)  # fmt: skip
def test_beams_with_every_option(problem):
    tables, limits, forced, fields = problem
    stopping = fields.pop("stopping")
    if stopping.get("patience") == 0.5:
        fields["top_beams"] = 1
    options = SearchOptions(**fields, **stopping)
    found = search(tables.step, torch.tensor(limits), options, forced=padded(forced))
    for number, limit in enumerate(limits):
        expected = search_reference.beams(tables.sentence(number), limit, options, forced[number])
        assert_found(found, number, expected, options.top_beams)


@settings(max_examples=150, deadline=None)
@given(
    problems(
        num_samples=st.integers(1, 3),
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.sampled_from([0, 1, 2, 4]),
        top_p=st.sampled_from([0.3, 0.8, 1.0]),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
)
def test_samples_with_every_option(problem):
    tables, limits, forced, fields = problem
    options = SearchOptions(**fields)
    keys = torch.arange(len(limits)) * 7 + 1
    found = search(tables.step, torch.tensor(limits), options, forced=padded(forced), keys=keys)
    numbers = torch.stack([uniforms(options.seed, keys, options.num_samples, p) for p in range(LONGEST)], -1).tolist()
    for number, limit in enumerate(limits):
        model = tables.sentence(number)
        drawn = [search_reference.sample(model, limit, options, forced[number], u)[0] for u in numbers[number]]
        assert_found(found, number, sorted(drawn, key=lambda one: -one[1]), options.num_samples)


@settings(max_examples=150, deadline=None)
@given(problems(beam_size=st.integers(1, 4), length_penalty=st.sampled_from([0.0, 1.0]), stopping=st.booleans()))
def test_streamed_tokens_are_those_of_the_best_translation(problem):
    tables, limits, forced, fields = problem
    options = SearchOptions(**fields | {"no_repeat_ngram_size": 0}, patience=2.0) if fields.pop("stopping") else (
        SearchOptions(**fields | {"no_repeat_ngram_size": 0}))  # fmt: skip
    texts, done = [[] for _ in limits], []

    def on_tokens(new):
        for sentence, position, token in zip(*(x.tolist() for x in new[:3]), strict=True):
            assert sentence not in done
            assert position == len(texts[sentence]), "one after the other"
            texts[sentence].append(token)
        done.extend(new.done.tolist())

    found = search(tables.step, torch.tensor(limits), options, forced=padded(forced), on_tokens=on_tokens)
    assert texts == [beams[0] for beams in found.tolist()]
    assert sorted(done) == list(range(len(limits)))


def test_tokens_are_told_as_soon_as_they_are_certain():
    tables, told = Tables(3, seed=1), []
    search(tables.step, torch.tensor([7, 7, 7]), SearchOptions(beam_size=1, min_length=4), on_tokens=told.append)
    assert [new.positions.tolist() for new in told[:4]] == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    told.clear()
    forced = torch.tensor([[3, 4, 5]] * 3)
    search(tables.step, torch.tensor([7, 7, 7]), SearchOptions(), forced=forced, on_tokens=told.append)
    assert [new.tokens.tolist() for new in told[:3]] == [[3] * 3, [4] * 3, [5] * 3], "beams that have one past"


def hand_made(table):
    """A step whose next token has the probabilities table["tokens so far"]; where it has none, eos."""

    def step(prefixes, sentences, parents):
        rows = []
        for prefix in prefixes[:, 1:].tolist():
            chances = table.get("".join("..EabcdX"[t] for t in prefix), {"E": 1.0})
            rows.append([chances.get(letter, 0.0) for letter in "..Eabcd"])
        return torch.tensor(rows, dtype=torch.float64).log()

    return step


TREE = {
    "": {"a": 0.6, "b": 0.4},
    "a": {"a": 0.5, "b": 0.3, "E": 0.2},
    "b": {"E": 0.9, "a": 0.1},
    "aa": {"E": 0.5, "c": 0.5},
    "ab": {"E": 1.0},
}


def test_beams_worked_by_hand():
    """Two beams on TREE. Step 1: a .6, b .4. Step 2: bE .36 ends, aa .30 and ab .18 live, aE .12 ends.

    At alpha 0 the best alive, .30, can't beat .36: done. At alpha 1 (penalties 7/6 for two tokens, 8/6 for three, 9/6
    for four, the limit) bE has ln .36 · 6/7 = -.8757, aa can still have ln .30 · 6/9 = -.8026: on. Step 3: abE .18, aaE
    .15 and aac .15; abE has ln .18 · 6/8 = -1.286, aac can have ln .15 · 6/9 = -1.2648: below bE, done.
    """
    step, limit = hand_made(TREE), torch.tensor([4])
    flat = search_beams(step, limit, beam_size=2, length_penalty=0.0)
    assert flat.tolist() == [[[4]]] and flat.scores.item() == pytest.approx(math.log(0.36))
    assert flat.log_probs[0, 0].tolist() == pytest.approx([math.log(0.4), math.log(0.9), 0, 0])
    rows = []
    for alpha in (0.0, 1.0):
        rows.append(0)

        def counted(*args):
            rows[-1] += 1
            return step(*args)

        best = search_beams(counted, limit, beam_size=2, length_penalty=alpha)
        assert best.tolist() == [[[4]]]
        assert best.scores.item() == pytest.approx(math.log(0.36) / (7 / 6) ** alpha)
    assert rows == [2, 3]
    both = search_beams(step, limit, beam_size=2, top_beams=2, length_penalty=1.0)
    assert both.tolist() == [[[4], [3, 3, 5]]], "the second place was still to be had: aacE has -1.2648"
    assert both.scores[0].tolist() == pytest.approx([math.log(0.36) * 6 / 7, math.log(0.15) * 6 / 9])


def test_power_penalty_worked_by_hand():
    """|y|^2: bE ln .36 / 4 = -.2554; abE ln .18 / 9 = -.1905; aaE ln .15 / 9 = -.2108; aacE ln .15 / 16 = -.1186."""
    options = SearchOptions(beam_size=3, top_beams=3, length_penalty=2, penalty="power")
    found = search_beams(hand_made(TREE), torch.tensor([4]), options)
    assert found.tolist() == [[[3, 3, 5], [3, 4], [3, 3]]]
    assert found.scores[0].tolist() == pytest.approx([math.log(0.15) / 16, math.log(0.18) / 9, math.log(0.15) / 9])


def test_patience_worked_by_hand():
    """Two beams: bE is the first to end; aE, behind two that live on, does not count; then abE, then aaE or aac."""
    tree, limit, calls = hand_made(TREE), torch.tensor([4]), []

    def step(*args):
        calls.append(args)
        return tree(*args)

    def found(**options):
        calls.clear()
        return search_beams(step, limit, length_penalty=2.0, penalty="power", beam_size=2, **options).tolist()

    assert found(patience=0.5) == [[[4]]], "the first finished one, though later ones would score higher"
    assert len(calls) == 2
    assert found(patience=1.0, top_beams=2) == [[[3, 4], [4]]]
    assert len(calls) == 3
    assert found(patience=2.0, top_beams=2) == [[[3, 3, 5], [3, 4]]]
    assert len(calls) == 4


def test_one_beam_is_greedy_unless_beam_search_is_asked_for():
    tree = {"": {"E": 0.6, "a": 0.4}, "a": {"E": 1.0}}
    limit, options = torch.tensor([4]), SearchOptions(beam_size=1, length_penalty=9.0)
    assert search(hand_made(tree), limit, options).tolist() == [[[]]]
    assert search(hand_made(tree), limit, replace(options, patience=2.0)).tolist() == [[[3]]]
    assert search(hand_made(tree), limit, replace(options, stop_early=False)).tolist() == [[[3]]]


def test_no_ngram_twice_finds_what_a_search_of_text_finds():
    for tokens in itertools.product([3, 4], repeat=6):
        for size in range(1, 5):
            row, banned = repeating(torch.tensor([tokens]), size)
            grams = {tokens[i : i + size] for i in range(len(tokens) - size + 1)}
            expected = {t for t in (3, 4) if (*tokens[len(tokens) - size + 1 :], t) in grams}
            assert set(banned.tolist()) == expected and not row.any()


def test_a_dead_end_gives_nothing():
    options = SearchOptions(suppress_tokens=tuple(range(VOCABULARY)))
    tables = Tables(2, seed=0)
    for one in (options, replace(options, beam_size=1), replace(options, num_samples=2)):
        found = search(tables.step, torch.tensor([4, 4]), one)
        assert not found.lengths.any() and not found.finished.any() and not found.log_probs.any()
        assert (found.scores == -INF).all()


def test_the_steps_own_logits_are_left_alone():
    logits = torch.randn(1, VOCABULARY)
    before = logits.clone()
    options = SearchOptions(beam_size=1, min_length=3, suppress_tokens=(4,))
    search(lambda prefixes, *_: logits.expand(len(prefixes), -1), torch.tensor([6]), options)
    assert torch.equal(logits, before)


def test_draws_follow_the_probabilities():
    logits = torch.randn(VOCABULARY).expand(20_000, -1)
    logits = logits.masked_fill(torch.tensor([True] + [False] * (VOCABULARY - 1)), -INF)
    uniform = uniforms(3, torch.arange(20_000), 1, 0)[:, 0]
    log_probs, tokens = draw(logits, uniform, SearchOptions(num_samples=1, temperature=1.3))
    shares = tokens.bincount(minlength=VOCABULARY) / len(tokens)
    torch.testing.assert_close(shares, (logits[0] / 1.3).softmax(0), atol=0.015, rtol=0)
    assert torch.equal(log_probs, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])


def test_top_p_ends_where_it_is_reached():
    """Of four times 1/4 (exact in every arithmetic) two have 0.5, and 0.51 takes three."""
    highest = torch.tensor([0.999], dtype=torch.float64)
    for top_p, token in ((0.25, 0), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3)):
        assert draw(torch.zeros(1, 4), highest, SearchOptions(num_samples=1, top_p=top_p))[1].item() == token


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_the_last_number_draws_a_token_that_can_be_drawn(options):
    logits = torch.tensor([[0.0, 1.0, -INF, -INF], [-INF, 0.0, 1e-3, -INF]])
    highest = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64)
    for uniform in (highest, torch.zeros_like(highest)):
        log_probs, _ = draw(logits, uniform, SearchOptions(num_samples=1, **options))
        assert log_probs.isfinite().all()


def test_random_numbers_are_uniform_and_their_own():
    numbers = torch.stack([uniforms(0, torch.arange(50), 40, position) for position in range(10)])
    assert numbers.unique().numel() == numbers.numel() and numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert not torch.equal(numbers[0], uniforms(1, torch.arange(50), 40, 0))
    assert mix(torch.tensor([0])).item() == 0xE220A8397B1DCDAF - 2**64, "SplitMix64's first number from seed 0"


def test_a_key_is_of_the_sentence_alone():
    tokens = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 2], [6, 5, 7, 2], [5, 6, 7, 9]])
    keys = sentence_keys(tokens, torch.tensor([4, 3, 4, 3]))
    assert keys[1] == keys[3] and len({*keys.tolist()}) == 3
    assert torch.equal(keys, sentence_keys(torch.nn.functional.pad(tokens, (0, 5)), torch.tensor([4, 3, 4, 3])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"penalty": "wu"}, "penalty must be one of 'gnmt', 'power', got 'wu'"),
        ({"patience": 0.0}, "patience must be finite and positive"),
        ({"patience": 1.0, "stop_early": True}, "give one of them"),
        ({"patience": 0.4, "top_beams": 3}, r"ends with 2 finished hypotheses, fewer than top_beams \(3\)"),
        ({"min_length": -1}, "min_length must not be negative"),
        ({"min_length": 5, "max_length": 5}, r"max_length must be above min_length \(5\)"),
        ({"max_length_beyond_source": -1}, "max_length_beyond_source must not be negative"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must not be negative"),
        ({"suppress_tokens": (3, -1)}, "suppress_tokens must be token numbers, got -1"),
        ({"num_samples": -1}, "num_samples must not be negative"),
        ({"num_samples": 1, "temperature": 0.0}, "temperature must be finite and positive"),
        ({"num_samples": 1, "top_k": -1}, "top_k must not be negative"),
        ({"num_samples": 1, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"num_samples": 1, "top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"num_samples": 1, "seed": 2**63}, "seed must fit 64 bits"),
        ({"num_samples": 2, "top_beams": 2}, "num_samples is of sampling"),
        ({"temperature": 0.7}, "set num_samples too"),
    ],
)
def test_refused_options(fields, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**fields)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"min_length": 4}, {}, r"above min_length \(4\), as it counts eos, got 4"),
        ({"suppress_tokens": (9,)}, {}, "there is no token 9 in a vocabulary of 6"),
        ({}, {"forced": torch.tensor([[3], [9]])}, "there is no token 9 in a vocabulary of 6"),
        ({}, {"forced": torch.tensor([[3]])}, "a forced prefix for each of 2 sentences, got 1"),
        ({}, {"forced": torch.tensor([[3.0], [3.0]])}, r"a forced prefix must be \(B, P\) int64"),
        ({}, {"forced": torch.tensor([[-3], [3]])}, "a forced prefix holds token numbers, got -3"),
        ({}, {"forced": torch.tensor([[3, EOS], [3, 3]])}, r"can't hold eos \(2\)"),
        ({}, {"forced": torch.tensor([[3, 3], [0, 3]])}, r"has padding \(0\) ahead of a token"),
        (
            {},
            {"forced": torch.full((2, 4), 3)},
            "the forced prefix of sentence 0 has 4 tokens, and its translation may",
        ),
        ({"num_samples": 2}, {"on_tokens": print}, "on_tokens follows one translation"),
        ({"num_samples": 2}, {"keys": torch.tensor([1])}, r"keys must be \(2,\) int64"),
    ],
)
def test_refused_arguments(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        search(Tables(2, 0).step, torch.tensor([4, 4]), SearchOptions(**options), **arguments)


def test_a_prefix_may_be_padded_with_a_negative_number():
    forced = torch.tensor([[4, 5], [3, -1]])
    found = search(Tables(2, 0).step, torch.tensor([4, 4]), forced=forced, padding_idx=-1)
    assert found.tokens[0, 0, :2].tolist() == [4, 5] and int(found.tokens[1, 0, 0]) == 3


def test_samples_need_a_number_of_them():
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        search_samples(Tables(1, 0).step, torch.tensor([4]), SearchOptions())


def test_nan_is_an_error_when_drawing():
    step = lambda prefixes, *_: torch.full((len(prefixes), VOCABULARY), math.nan)  # noqa: E731
    for fields in ({}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="NaN"):
            search(step, torch.tensor([4]), SearchOptions(num_samples=2, **fields))


def test_bos_is_no_part_of_a_repeated_ngram():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, BOS], logits[0, EOS] = 2.0, -1.0
    options = SearchOptions(beam_size=1, no_repeat_ngram_size=1)
    found = search(lambda prefixes, *_: logits.expand(len(prefixes), -1), torch.tensor([3]), options)
    assert found.tokens[0, 0].tolist() == [BOS, 0, 3]
