"""Greedy and beam search against full enumeration, and against a slow transcription of tensor2tensor's algorithm."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.decoding import beam_search, greedy
from fused_transformer.search import search_beams, search_greedy
from tests.inputs import running_on

pytestmark = pytest.mark.usefixtures("one_thread")

BOS, EOS, VOCABULARY = 1, 2, 5
INF = float("inf")


class ToyModel:
    """Random logits that depend on the sentence, the position and the last two tokens."""

    def __init__(self, sentences, longest, *, eos_bonus=0.0, seed=0, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        shape = (sentences, longest + 1, VOCABULARY, VOCABULARY, VOCABULARY)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        self.logits[..., EOS] += eos_bonus
        self.rows_seen = []

    def step(self, prefixes, sentences, parents):
        self.rows_seen.append(len(prefixes))
        if prefixes.shape[1] > 1:  # each row continues the row that it says it does
            assert torch.equal(prefixes[:, :-1], self.last_prefixes[parents])
            assert torch.equal(sentences, self.last_sentences[parents])
        self.last_prefixes, self.last_sentences = prefixes, sentences
        position = torch.full_like(sentences, prefixes.shape[1] - 1)
        before = prefixes[:, -2] if prefixes.shape[1] > 1 else torch.zeros_like(sentences)
        return self.logits[sentences, position, before, prefixes[:, -1]]

    def log_probs(self, sentence, prefix):
        before = prefix[-2] if len(prefix) > 1 else 0
        return torch.log_softmax(self.logits[sentence, len(prefix) - 1, before, prefix[-1]], -1).tolist()


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def every_finished_sequence(model, sentence, longest):
    """(tokens without eos, log-probability, length with eos) of all sequences of at most `longest` tokens."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    for length in range(longest):
        for tokens in itertools.product(others, repeat=length):
            prefix, total = [BOS], 0.0
            for token in (*tokens, EOS):
                total += model.log_probs(sentence, prefix)[token]
                prefix.append(token)
            yield list(tokens), total, length + 1


def tensor2tensor(model, sentence, longest, beam_size, top_beams, alpha):
    """One sentence of tensor2tensor's beam search, with Python lists: [(tokens, score, finished)]."""
    alive = [(0.0, [BOS])]
    finished = []  # (score, tokens)
    i = 0
    while i < longest:
        candidates = []
        for total, tokens in alive:
            for token, log_prob in enumerate(model.log_probs(sentence, tokens)):
                if log_prob > -INF:
                    candidates.append((total + log_prob, [*tokens, token]))
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beam_size]
        alive = [c for c in candidates if c[1][-1] != EOS][:beam_size]
        ended = [(total / penalty(i + 1, alpha), tokens) for total, tokens in candidates if tokens[-1] == EOS]
        finished = sorted(finished + ended, key=lambda c: -c[0])[:beam_size]
        i += 1
        hope = alive[0][0] / penalty(longest, alpha)
        if top_beams == 1:
            bound = finished[0][0] if finished else -INF
        else:
            bound = finished[-1][0] if len(finished) == beam_size else -INF
        if bound > hope:
            break
    if finished:
        return [(tokens[1:-1], score, True) for score, tokens in finished[:top_beams]]
    return [(tokens[1:], total, False) for total, tokens in alive[:top_beams]]


def assert_hypotheses(found, sentence, expected, top_beams):
    for rank in range(top_beams):
        tokens, score, finished = expected[rank] if rank < len(expected) else ([], -INF, False)
        length = int(found.lengths[sentence, rank])
        assert found.tokens[sentence, rank, :length].tolist() == tokens
        assert not found.tokens[sentence, rank, length:].any(), "padding beyond the hypothesis"
        assert float(found.scores[sentence, rank]) == pytest.approx(score, rel=1e-5)
        assert bool(found.finished[sentence, rank]) == finished


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all_sequences(alpha):
    longest, top_beams = 4, 6
    model = ToyModel(3, longest)
    found = search_beams(
        model.step, torch.full((3,), longest), beam_size=4**longest, top_beams=top_beams, length_penalty=alpha
    )
    for sentence in range(3):
        ranked = sorted(
            (
                (tokens, total / penalty(n, alpha), True)
                for tokens, total, n in every_finished_sequence(model, sentence, 4)
            ),
            key=lambda c: -c[1],
        )
        assert_hypotheses(found, sentence, ranked, top_beams)


@pytest.mark.parametrize("eos_bonus", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@pytest.mark.parametrize(("beam_size", "top_beams"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
def test_matches_tensor2tensor_sentence_by_sentence(beam_size, top_beams, alpha, eos_bonus):
    max_lengths = torch.tensor([1, 2, 9, 12, 5, 12, 3, 12])
    model = ToyModel(len(max_lengths), 12, eos_bonus=eos_bonus, seed=beam_size)
    found = search_beams(model.step, max_lengths, beam_size=beam_size, top_beams=top_beams, length_penalty=alpha)
    for sentence, longest in enumerate(max_lengths.tolist()):
        expected = tensor2tensor(model, sentence, longest, beam_size, top_beams, alpha)
        assert_hypotheses(found, sentence, expected, top_beams)


def test_nothing_finished_gives_the_alive_hypotheses_with_plain_log_probabilities():
    model = ToyModel(2, 6, eos_bonus=-INF)
    found = search_beams(model.step, torch.tensor([3, 6]), beam_size=3, top_beams=3, length_penalty=0.6)
    assert not found.finished.any()
    assert found.lengths.tolist() == [[3] * 3, [6] * 3]
    for sentence, longest in enumerate([3, 6]):
        assert_hypotheses(found, sentence, tensor2tensor(model, sentence, longest, 3, 3, 0.6), 3)


def test_impossible_hypotheses_are_not_returned_as_finished():
    def step(prefixes, sentences, parents):  # after bos only 3; after it only eos: one sequence has a probability
        logits = torch.full((len(prefixes), VOCABULARY), -INF)
        logits[:, EOS if prefixes.shape[1] > 1 else 3] = 0.0
        return logits

    found = search_beams(step, torch.tensor([9]), beam_size=4, top_beams=3)
    assert found.tolist() == [[[3], [], []]]
    assert found.finished.tolist() == [[True, False, False]]
    assert found.scores[0, 0] == 0 and found.scores[0, 1:].tolist() == [-INF, -INF]


def test_the_length_penalty_prefers_longer_translations():
    model = ToyModel(40, 10, eos_bonus=1.0)
    limits = torch.full((40,), 10)
    lengths = [
        search_beams(model.step, limits, beam_size=6, length_penalty=alpha).lengths.sum() for alpha in (0.0, 1.0, 3.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


def step_of_one_sentence(model, sentence, prefixes, rows, parents):
    return model.step(prefixes, rows + sentence, parents)


def test_a_sentence_does_not_depend_on_its_batch():
    model = ToyModel(6, 9)
    limits = torch.tensor([4, 9, 2, 7, 9, 5])
    together = search_beams(model.step, limits, beam_size=3, top_beams=2)
    for sentence in range(6):
        step = partial(step_of_one_sentence, model, sentence)
        alone = search_beams(step, limits[sentence : sentence + 1], beam_size=3, top_beams=2)
        assert alone.tolist()[0] == together.tolist()[sentence]
        assert torch.equal(alone.scores[0], together.scores[sentence])


def test_finished_sentences_leave_the_batch():
    model = ToyModel(5, 12, eos_bonus=1.0)
    search_beams(model.step, torch.full((5,), 12), beam_size=2)
    assert model.rows_seen[0] == 10
    assert model.rows_seen == sorted(model.rows_seen, reverse=True)
    assert model.rows_seen[-1] < 10


def test_greedy_follows_the_likeliest_token():
    max_lengths = torch.tensor([1, 8, 3, 8, 8])
    model = ToyModel(5, 8)
    found = search_greedy(model.step, max_lengths)
    for sentence, longest in enumerate(max_lengths.tolist()):
        prefix, total = [BOS], 0.0
        while prefix[-1] != EOS and len(prefix) - 1 < longest:
            log_probs = model.log_probs(sentence, prefix)
            token = max(range(VOCABULARY), key=log_probs.__getitem__)
            total += log_probs[token]
            prefix.append(token)
        finished = prefix[-1] == EOS
        assert_hypotheses(found, sentence, [(prefix[1:-1] if finished else prefix[1:], total, finished)], 1)
    assert found.finished.any() and not found.finished.all(), "both ways to end are to be seen here"


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
@pytest.mark.parametrize("search", [search_greedy, partial(search_beams, beam_size=4, top_beams=3)])
def test_the_kernels_choose_what_torch_chooses(search, backend):
    model, max_lengths = ToyModel(6, 9), torch.tensor([9, 1, 4, 9, 9, 2])

    def step(prefixes, sentences, parents):
        return model.step(prefixes, sentences, parents).float()

    with running_on(backend):
        found = search(step, max_lengths)
    assert_same(found, search(model.step, max_lengths))


def test_a_beam_of_one_may_look_past_the_first_eos():
    # Greedy ends with eos at once; the search goes on with the runner-up, which the length penalty then prefers.
    probabilities = torch.tensor([0.0, 0.0, 0.51, 0.49, 0.0])

    def step(prefixes, sentences, parents):
        ended = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
        return (probabilities if prefixes.shape[1] == 1 else ended).log().expand(len(prefixes), -1)

    assert search_greedy(step, torch.tensor([5])).tolist() == [[[]]]
    assert search_beams(step, torch.tensor([5]), beam_size=1, length_penalty=2.0).tolist() == [[[3]]]


def test_no_sentences_give_no_hypotheses():
    def step(prefixes, sentences, parents):
        raise AssertionError("there is nothing to decode")

    none = torch.zeros(0, dtype=torch.int64)
    assert search_greedy(step, none).tokens.shape == (0, 1, 0)
    assert search_beams(step, none, beam_size=3, top_beams=2).tokens.shape == (0, 2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "top_beams must be between 1 and beam_size"),
        ({"beam_size": 2, "top_beams": 3}, r"top_beams must be between 1 and beam_size \(2\), got 3"),
        ({"length_penalty": -0.1}, "length_penalty must be finite and not negative"),
        ({"length_penalty": math.nan}, "length_penalty must be finite and not negative"),
        ({"max_lengths": torch.tensor([3, 0])}, "max_lengths must be at least 1"),
        ({"max_lengths": torch.tensor([3.0])}, r"max_lengths must be \(B,\) int64"),
    ],
)
def test_refused_options(options, message):
    model = ToyModel(2, 3)
    arguments = {"max_lengths": torch.tensor([3, 3]), **options}
    with pytest.raises(ValueError, match=message):
        search_beams(model.step, **arguments)


@pytest.mark.parametrize("search", [search_greedy, search_beams])
def test_nan_logits_are_an_error(search):
    with pytest.raises(ValueError, match="NaN"):
        search(lambda prefixes, rows, parents: torch.full((len(rows), VOCABULARY), math.nan), torch.tensor([3]))


@pytest.mark.parametrize("search", [search_greedy, search_beams])
def test_logits_of_the_wrong_shape_are_an_error(search):
    with pytest.raises(ValueError, match="step must return logits"):
        search(lambda prefixes, rows, parents: torch.zeros(len(rows) + 1, VOCABULARY), torch.tensor([3]))


def test_one_word_to_choose_from_is_an_error():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        search_beams(lambda prefixes, rows, parents: torch.zeros(len(rows), 1), torch.tensor([3]), eos_idx=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = TransformerConfig(
        source_vocab_size=11, d_model=16, num_heads=2, d_feedforward=32, num_encoder_layers=1, num_decoder_layers=2
    )
    return Transformer(config)


SOURCE = torch.tensor([[4, 5, 6, 7, 2], [8, 2, 0, 0, 0], [9, 10, 2, 0, 0]])
LIMITS = torch.tensor([7, 5, 6])


def without_cache(model, source):
    """A step function that runs the decoder over the whole prefix again."""
    return lambda prefixes, rows, parents: model(source[rows], prefixes)[:, -1]


def assert_same(found, expected):
    assert found.tolist() == expected.tolist()
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.finished, expected.finished)


@pytest.mark.parametrize(("beam_size", "top_beams"), [(2, 1), (4, 3)])
def test_beam_search_on_a_model_equals_the_search_without_its_cache(model, beam_size, top_beams):
    expected = search_beams(
        without_cache(model.eval(), SOURCE), LIMITS, beam_size=beam_size, top_beams=top_beams, length_penalty=0.6
    )
    found = beam_search(model, SOURCE, beam_size=beam_size, top_beams=top_beams, max_lengths=LIMITS)
    assert_same(found, expected)


def test_greedy_on_a_model_equals_the_search_without_its_cache(model):
    expected = search_greedy(without_cache(model.eval(), SOURCE), LIMITS)
    assert_same(greedy(model, SOURCE, max_lengths=LIMITS), expected)
    assert_same(beam_search(model, SOURCE, beam_size=1, max_lengths=LIMITS), expected)


def test_a_translation_has_at_most_fifty_tokens_more_than_its_source(model):
    found = greedy(model, SOURCE)
    assert found.tokens.shape == (3, 1, 55)
    assert (found.lengths[:, 0] <= torch.tensor([5, 2, 3]) + 50).all()


def test_dropout_is_off_while_decoding_and_the_mode_is_left_as_it_was(model):
    model.train()
    assert_same(greedy(model, SOURCE, max_lengths=LIMITS), greedy(model, SOURCE, max_lengths=LIMITS))
    assert model.training
    model.eval()
    beam_search(model, SOURCE, beam_size=2, max_lengths=LIMITS)
    assert not model.training


def test_refused_sources(model):
    with pytest.raises(ValueError, match=r"source_tokens must be \(B, S\), got shape \(5,\)"):
        greedy(model, SOURCE[0])
    with pytest.raises(TypeError, match=r"source_tokens must be a torch\.Tensor, got list"):
        beam_search(model, SOURCE.tolist())
    with pytest.raises(ValueError, match=r"max_lengths must be \(3,\), got shape \(2,\)"):
        greedy(model, SOURCE, max_lengths=torch.tensor([3, 3]))
