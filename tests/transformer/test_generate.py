"""Every option of a search on a model with its cache, against the same search that decodes whole prefixes again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fused_transformer.decoding import generate
from fused_transformer.sampling import sentence_keys
from fused_transformer.search import SearchOptions, search
from tests.transformer.models import LENGTHS, SOURCE, VOCAB, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = torch.tensor([9, 6, 7])
PREFIXES = torch.tensor([[7, 9], [8, 0], [0, 0]])
OPTIONS = {
    "greedy": {"beam_size": 1},
    "beams": {"beam_size": 3, "top_beams": 2},
    "wide_beams": {"beam_size": 11, "top_beams": 11},
    "power_penalty": {"penalty": "power", "length_penalty": 1.2},
    "not_stopping_early": {"stop_early": False},
    "patience": {"patience": 2.0, "top_beams": 4},
    "little_patience": {"patience": 0.5},
    "min_length": {"min_length": 5},
    "greedy_min_length": {"beam_size": 1, "min_length": 5},
    "no_repeats": {"no_repeat_ngram_size": 1},
    "greedy_no_repeats": {"beam_size": 1, "no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": (0, 1, 3)},
    "samples": {"num_samples": 3, "seed": 5},
    "top_k": {"num_samples": 2, "top_k": 4, "temperature": 1.5},
    "top_p": {"num_samples": 1, "top_p": 0.7, "no_repeat_ngram_size": 2, "min_length": 3},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(8)
    model = tiny().eval()
    with torch.no_grad():
        model.source_embedding.weight *= 2.5  # far from uniform, so that options change what is found
    return model


def without_cache(model, source=SOURCE):
    return lambda prefixes, rows, parents: model(source[rows], prefixes)[:, -1]


def assert_same(found, expected):
    assert found.tolist() == expected.tolist()
    assert torch.equal(found.finished, expected.finished)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefixes", [None, PREFIXES], ids=["free", "prefixed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_search_without_a_cache(model, name, prefixes, device):
    options, model = SearchOptions(**OPTIONS[name]), copy.deepcopy(model).to(device)
    source, lengths, limits = (x.to(device) for x in (SOURCE, LENGTHS, LIMITS))
    prefixes = None if prefixes is None else prefixes.to(device)
    keys = sentence_keys(source, lengths)
    assert keys.tolist() == sentence_keys(SOURCE, LENGTHS).tolist()
    expected = search(without_cache(model, source), limits, options, forced=prefixes, keys=keys)
    found = generate(model, source, options=options, max_lengths=limits, prefixes=prefixes)
    assert found.tokens.shape == (3, options.returned, 9)
    assert_same(found, expected)
    if prefixes is not None:
        assert (found.tokens[0, found.lengths[0] > 0, :2] == prefixes[0]).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_log_probabilities_are_the_models(model, name):
    """Where nothing is forbidden the log-probabilities are those of a forced decode; they add up to the score."""
    options = SearchOptions(**OPTIONS[name])
    found = generate(model, SOURCE, options=options, max_lengths=LIMITS)
    total = found.log_probs.double().sum(-1).float()
    if not options.num_samples and options.beam_size > 1:
        length = found.lengths + found.finished
        total = torch.where(found.finished, total / options.penalise(length.clamp(min=1)), total)
    real = found.scores.isfinite()
    torch.testing.assert_close(total[real], found.scores[real], rtol=1e-5, atol=1e-5)
    if options.min_length or options.no_repeat_ngram_size or options.suppress_tokens:
        return
    hypotheses, width = found.tokens.shape[1:]
    tokens = found.tokens.flatten(0, 1)
    steps = (found.lengths + found.finished).flatten()
    last = found.lengths.flatten()[:, None] == torch.arange(width)
    target = torch.where(last & found.finished.flatten()[:, None], 2, tokens)
    logits = model(SOURCE.repeat_interleave(hypotheses, 0), F.pad(tokens, (1, 0), value=1)[:, :-1])
    expected = logits.log_softmax(-1).gather(2, target[..., None])[..., 0]
    expected = torch.where(torch.arange(width) < steps[:, None], expected, 0.0).view(found.log_probs.shape)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_its_sentence_and_the_seed_alone(model):
    options = SearchOptions(num_samples=4, seed=1)
    together = generate(model, SOURCE, options=options, max_lengths=LIMITS)
    for row in (2, 0, 1):
        source = SOURCE[row : row + 1, : LENGTHS[row]]
        alone = generate(model, source, options=options, max_lengths=LIMITS[row : row + 1])
        assert alone.tolist()[0] == together.tolist()[row]
    assert generate(model, SOURCE, options=options, max_lengths=LIMITS).tolist() == together.tolist()
    other = generate(model, SOURCE, options=SearchOptions(num_samples=4, seed=2), max_lengths=LIMITS)
    assert other.tolist() != together.tolist()
    assert len({tuple(tokens) for tokens in together.tolist()[0]}) > 1, "samples of a sentence differ"


@pytest.mark.parametrize("beam_size", [1, 4])
def test_log_probabilities_keep_their_digits_however_low_the_score(beam_size):
    """A score in the thousands has three digits behind the point; its tokens' log-probabilities have six."""
    logits = torch.randn(301, 50, 50, generator=torch.Generator().manual_seed(beam_size), dtype=torch.float64) * 4
    logits[..., 2] = -torch.inf

    def step(prefixes, sentences, parents):
        return logits[prefixes.shape[1], prefixes[:, -1]].float()

    found = search(step, torch.tensor([300]), SearchOptions(beam_size=beam_size))
    tokens = found.tokens[0, 0]
    before = torch.cat([torch.tensor([1]), tokens[:-1]])
    expected = logits.float().double().log_softmax(-1)[torch.arange(1, 301), before, tokens]
    torch.testing.assert_close(found.log_probs[0, 0].double(), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(found.scores[0, 0].double(), expected.sum(), rtol=2e-7, atol=0)


def test_limits_come_from_the_options(model):
    def widths(**options):
        found = generate(model, SOURCE, options=SearchOptions(beam_size=1, suppress_tokens=(2,), **options))
        assert not found.finished.any()
        return found.lengths[:, 0].tolist()

    assert widths() == [56, 53, 55]
    assert widths(max_length_beyond_source=2) == [8, 5, 7]
    assert widths(max_length_beyond_source=0, max_length=4) == [4, 3, 4]
    assert widths(max_length_beyond_source=0, min_length=4) == [6, 5, 5]


def test_prefixes_are_refused_by_the_models_special_tokens(model):
    with pytest.raises(ValueError, match="can't hold eos"):
        generate(model, SOURCE, prefixes=torch.full((3, 1), model.config.eos_idx))
    with pytest.raises(ValueError, match=f"there is no token {VOCAB}"):
        generate(model, SOURCE, prefixes=torch.full((3, 1), VOCAB))


def test_streamed_tokens_are_those_returned(model):
    streamed = [[], [], []]

    def on_tokens(new):
        for sentence, token in zip(new.sentences.tolist(), new.tokens.tolist(), strict=True):
            streamed[sentence].append(token)

    for options in (SearchOptions(), SearchOptions(beam_size=1), SearchOptions(num_samples=1)):
        streamed[:] = [], [], []
        found = generate(model, SOURCE, options=options, max_lengths=LIMITS, on_tokens=on_tokens)
        assert streamed == [beams[0] for beams in found.tolist()]
