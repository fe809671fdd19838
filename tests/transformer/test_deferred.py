"""Greedy search that tells tokens from less than all logits, and log-probabilities afterwards or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_transformer import PackedTransformer, SearchOptions, deferred, generate, greedy, inference
from fused_transformer.deferred import DeferringStep
from fused_transformer.kernels.linear_argmax import ScreenedLinear
from fused_transformer.search import search, search_greedy
from tests.oracle import assert_equal
from tests.transformer.models import LENGTHS, SOURCE, tiny


@pytest.fixture(autouse=True)
def _small_vocabularies_too(monkeypatch):
    monkeypatch.setattr(inference, "LEAST_SCREENED", 1)


def assert_same(got, want) -> None:
    assert_equal([got.tokens, got.lengths, got.finished], [want.tokens, want.lengths, want.finished])
    for part in ("scores", "log_probs"):
        torch.testing.assert_close(getattr(got, part), getattr(want, part), atol=1e-5, rtol=1e-5)


def plain(packed: PackedTransformer) -> PackedTransformer:
    """The same model, which computes all logits at every step."""
    packed._screened = None
    return packed


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_it_finds_what_all_logits_do(monkeypatch, rows):
    monkeypatch.setattr(deferred, "ROWS", rows)
    model = tiny().eval()
    for source, lengths in ((SOURCE, LENGTHS), (SOURCE[:1], LENGTHS[:1]), (SOURCE.repeat(3, 1), LENGTHS.repeat(3))):
        want = greedy(model, source, lengths)
        assert_same(greedy(PackedTransformer(model), source, lengths), want)
        assert_same(greedy(plain(PackedTransformer(model)), source, lengths), want)


class Counting(PackedTransformer):
    """Counts the rows whose logits are computed, and those whose likeliest token is found without."""

    projected = screened = 0

    def project(self, hidden):
        self.projected += len(hidden)
        return super().project(hidden)

    def likeliest(self, hidden, **options):
        found = super().likeliest(hidden, **options)
        self.screened += 0 if found is None else len(hidden)
        return found


def test_logits_are_computed_once_for_scores_and_else_not_at_all():
    model = Counting(tiny().eval())
    found = greedy(model, SOURCE, LENGTHS)
    steps = int((found.lengths + found.finished).sum())
    assert model.screened == model.projected == steps
    model.projected = model.screened = 0
    bare = generate(model, SOURCE, LENGTHS, SearchOptions(beam_size=1, scores=False))
    assert (model.projected, model.screened) == (0, steps)
    assert_equal([bare.tokens, bare.lengths, bare.finished], [found.tokens, found.lengths, found.finished])
    assert (bare.scores == 0).all() and (bare.log_probs == 0).all()


def test_many_rows_have_all_logits_until_few_are_left():
    whole = tiny().eval()
    model = Counting(whole)
    source, lengths = SOURCE.repeat(3, 1), LENGTHS.repeat(3)  # 9 sentences
    limits = torch.tensor([2, 2, 2, 2, 2, 2, 9, 9, 9])
    want = greedy(whole, source, lengths, max_lengths=limits)
    found = greedy(model, source, lengths, max_lengths=limits)
    assert_same(found, want)
    assert model.screened > 0 and model.projected > model.screened


def test_without_scores_more_rows_do_without_logits(monkeypatch):
    model = Counting(tiny().eval())
    source, lengths = SOURCE.repeat(3, 1), LENGTHS.repeat(3)  # 9 sentences
    options = SearchOptions(beam_size=1, scores=False)
    want = greedy(model, source, lengths)
    for most in (4, 256):
        model.projected = model.screened = 0
        monkeypatch.setattr(ScreenedLinear, "most_rows", most)
        found = generate(model, source, lengths, options)
        assert (model.projected > 0) == (most < len(source))
        assert_equal([found.tokens, found.lengths], [want.tokens, want.lengths])


def test_tokens_are_told_at_each_step():
    model, told = PackedTransformer(tiny().eval()), []
    found = generate(model, SOURCE, LENGTHS, SearchOptions(beam_size=1), on_tokens=told.append)
    tokens = [[] for _ in SOURCE]
    for new in told:
        for sentence, token in zip(new.sentences.tolist(), new.tokens.tolist(), strict=True):
            tokens[sentence].append(token)
    assert tokens == [rows[0] for rows in found.tolist()]


@pytest.mark.parametrize("options", [{"min_length": 4}, {"suppress_tokens": (7,)}, {"no_repeat_ngram_size": 2}])
def test_where_tokens_are_forbidden_all_logits_are_computed(options):
    whole = tiny().eval()
    model, search_options = Counting(whole), SearchOptions(beam_size=1, **options)
    assert_same(generate(model, SOURCE, LENGTHS, search_options), generate(whole, SOURCE, LENGTHS, search_options))
    assert model.screened == 0 and model.projected > 0


def test_scores_that_are_not_asked_for_are_0_on_every_way():
    model, options = tiny().eval(), SearchOptions(beam_size=1, scores=False, min_length=3)
    bare, found = (generate(model, SOURCE, LENGTHS, one) for one in (options, SearchOptions(beam_size=1, min_length=3)))
    assert_equal(bare.tokens, found.tokens)
    assert (bare.scores == 0).all() and (bare.log_probs == 0).all() and (found.scores < 0).all()
    # Nothing may follow: there is no translation, with scores or without.
    step = lambda prefixes, sentences, parents: torch.zeros(len(prefixes), 3)  # noqa: E731
    limits, forbidden = torch.tensor([4]), SearchOptions(beam_size=1, scores=False, suppress_tokens=(0, 1, 2))
    assert search(step, limits, forbidden).scores.item() == -float("inf")


def test_only_a_greedy_search_does_without_scores():
    for options in ({}, {"num_samples": 2, "beam_size": 1}, {"beam_size": 1, "patience": 1.0}):
        with pytest.raises(ValueError, match="ranked by scores"):
            SearchOptions(scores=False, **options)


def test_nan_is_an_error_at_once():
    model = tiny().eval()
    nn.init.constant_(model.decoder.layers[0].norm1.weight, float("nan"))
    with pytest.raises(ValueError, match="the logits hold NaN"):
        greedy(PackedTransformer(model), SOURCE, LENGTHS)


def test_what_is_not_worth_screening(monkeypatch):
    model = tiny().eval()
    assert PackedTransformer(model)._screened is not None
    assert PackedTransformer(model, weights="bfloat16")._screened is None
    assert PackedTransformer(model).nbytes > plain(PackedTransformer(model)).nbytes
    monkeypatch.setattr(inference, "LEAST_SCREENED", 10**9)
    packed = PackedTransformer(model)
    assert packed._screened is None and packed.likeliest(torch.zeros(1, 24)) is None
    monkeypatch.setattr(inference, "LEAST_SCREENED", 1)
    nn.init.constant_(model.source_embedding.weight[5:6], float("inf"))
    assert PackedTransformer(model)._screened is None


class Parts:
    """A step function whose logits are a table's rows, which it tells the likeliest token of without."""

    def __init__(self, table: torch.Tensor, most: int = 9) -> None:
        self.table, self.most = table, most

    def __call__(self, *arguments):
        return self.project(self.hidden(*arguments))

    def hidden(self, prefixes, sentences, parents):
        return self.table[(prefixes[:, -1] + sentences + 2) % len(self.table)]

    def likeliest(self, hidden):
        return hidden.max(1) if len(hidden) <= self.most else None

    def project(self, hidden):
        return hidden


def searched(table: torch.Tensor, limits: torch.Tensor, most: int = 9):
    """In parts, and all logits at every step."""
    step = Parts(table, most)
    assert isinstance(step, DeferringStep)
    return search_greedy(step, limits), search_greedy(lambda *arguments: step(*arguments), limits)


def test_a_step_function_in_parts():
    assert_same(*searched(5 * torch.eye(9), torch.tensor([6, 7])))


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_no_way_on(most):
    """Sentence 1 comes to a token after which all logits are -inf."""
    table = 5 * torch.eye(9)
    table[1] = -float("inf")
    for limits in ([6, 7], [6, 7, 5], [9, 3]):
        got, want = searched(table, torch.tensor(limits), most)
        assert_same(got, want)
    assert (want.scores == -float("inf")).any() and (want.scores > -float("inf")).any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinity_and_nan_are_errors(value):
    table = 5 * torch.eye(9)
    table[5, 3] = value
    for search_all in (0, 9):
        with pytest.raises(ValueError, match="the logits hold NaN"):
            search_greedy(Parts(table, search_all), torch.tensor([6, 7]))
