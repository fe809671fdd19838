"""Decoding that guesses ahead: the same bits as token by token whatever the guesses, fewer steps where they fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench import ahead
from fused_transformer import PackedTransformer, SearchOptions, Transformer, generate, guessing, inference
from fused_transformer.deferred import DeferringStep
from fused_transformer.guessing import Draft, Pace, levels_for, width_for
from fused_transformer.lookahead import LookingAhead
from fused_transformer.stepping import RankedStep
from tests.oracle import assert_equal
from tests.transformer.models import LENGTHS, SOURCE, VARIANTS, tiny


@pytest.fixture(autouse=True)
def _small_vocabularies_too(monkeypatch):
    monkeypatch.setattr(inference, "LEAST_SCREENED", 1)
    monkeypatch.setattr(guessing, "MOST_ROWS", 64)
    monkeypatch.setattr(guessing, "MOST_GREEDY_ROWS", 16)


class Counting(ahead.Counting):
    """Counts steps that look no further, too."""

    plain = 0

    def step(self, tokens, state):
        self.plain += 1
        return super().step(tokens, state)


def exact(model: Transformer) -> Counting:
    """Its draft is the model itself, which guesses all that a search can ask for."""
    packed = Counting(model)
    packed.draft = Draft.of(packed._decoder.rounded("float32"), packed._output, model.config.eos_idx)
    return packed


def misleading(model: Transformer) -> Counting:
    """Its draft is another model."""
    packed = Counting(model)
    other = Counting(tiny().eval())
    packed.draft = Draft.of(other._decoder, other._screened.rounded, model.config.eos_idx)
    return packed


SEARCHES = (
    {"beam_size": 1},
    {"beam_size": 1, "scores": False},
    {"beam_size": 2},
    {"beam_size": 4, "top_beams": 4},
    {"beam_size": 3, "patience": 1.0, "top_beams": 2},
    {"beam_size": 2, "min_length": 5},
    {"beam_size": 1, "no_repeat_ngram_size": 2},
    {"beam_size": 4, "suppress_tokens": (2, 7), "length_penalty": 0.0},
)


def search(packed: PackedTransformer, options: dict, sentences: int = 3, monkeypatch=None, **arguments):
    """Token by token if there is something to patch."""
    if monkeypatch is None:
        return generate(packed, SOURCE[:sentences], LENGTHS[:sentences], SearchOptions(**options), **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(guessing, "MOST_LEVELS", 0)
        return generate(packed, SOURCE[:sentences], LENGTHS[:sentences], SearchOptions(**options), **arguments)


@pytest.mark.parametrize("sentences", [1, 3])
@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("kind", [Counting, exact, misleading])
def test_the_same_bits_as_token_by_token(monkeypatch, kind, options, sentences):
    packed = kind(tiny().eval())
    want = search(packed, options, sentences, monkeypatch)
    assert packed.plain > 0 and packed.steps == packed.drafts == 0
    packed.plain = 0
    assert_equal(search(packed, options, sentences), want)
    assert packed.plain == 0 and packed.steps > 0 and packed.drafts > 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "no_layers"])
def test_every_kind_of_model(monkeypatch, variant):
    packed = Counting(tiny(**VARIANTS[variant]).eval())
    for options in ({"beam_size": 1}, {"beam_size": 4}):
        assert_equal(search(packed, options), search(packed, options, monkeypatch=monkeypatch))


def test_forced_prefixes_and_limits(monkeypatch):
    packed = Counting(tiny().eval())
    prefixes, limits = torch.tensor([[9, 9, 4], [7, 0, 0], [0, 0, 0]]), torch.tensor([5, 12, 1 + 3])
    for options in ({"beam_size": 1}, {"beam_size": 3, "top_beams": 3}):
        arguments = {"prefixes": prefixes, "max_lengths": limits}
        assert_equal(
            search(packed, options, **arguments), search(packed, options, monkeypatch=monkeypatch, **arguments)
        )


@pytest.mark.parametrize("beam_size", [1, 2])
def test_the_cache_grows(monkeypatch, beam_size):
    packed, options = exact(tiny().eval()), {"beam_size": beam_size, "min_length": 90, "max_length": 100}
    got = search(packed, options)
    assert_equal(got, search(packed, options, monkeypatch=monkeypatch))
    assert got.tokens.shape[2] > 2 * 32


@pytest.mark.parametrize("beam_size", [1, 4])
def test_where_guesses_fit_the_model_makes_few_steps(beam_size):
    """Four tokens a step, with three levels of guesses; the beams' are wide enough for all that can be asked for."""
    packed = exact(tiny().eval())
    found = search(packed, {"beam_size": beam_size, "min_length": 39, "max_length": 40}, sentences=1)
    assert found.lengths.item() >= 39
    assert packed.steps <= (11 if beam_size == 1 else 14) and packed.drafts <= 3 * packed.steps


def test_where_guesses_never_fit_they_are_given_up():
    packed = misleading(tiny().eval())
    search(packed, {"beam_size": 1, "min_length": 199, "max_length": 200}, sentences=1)
    assert 150 < packed.steps <= 200 and packed.drafts < 40


def test_tokens_and_steps_are_told_as_they_were(monkeypatch):
    packed = Counting(tiny().eval())
    told: list = [[], []]
    found = [
        search(packed, {"beam_size": 2}, monkeypatch=patch, on_tokens=told[i].append)
        for i, patch in enumerate((None, monkeypatch))
    ]
    assert_equal(*found)
    assert_equal(*told)


def test_nan_is_an_error_at_once():
    model = tiny().eval()
    nn.init.constant_(model.decoder.layers[0].norm1.weight, float("nan"))
    for options in ({"beam_size": 1}, {"beam_size": 4}):
        with pytest.raises(ValueError, match="the logits hold NaN"):
            search(Counting(model), options)


def test_a_weight_without_an_int8_form_leaves_no_draft():
    model = tiny().eval()
    nn.init.constant_(model.decoder.layers[0].feed_forward.linear1.weight[:1], float("inf"))
    packed = PackedTransformer(model)
    assert packed._screened is not None and packed.draft is None


def test_who_has_no_draft():
    model = tiny().eval()
    assert PackedTransformer(model).draft is not None
    assert PackedTransformer(model, weights="bfloat16").draft is None
    assert PackedTransformer(model, look_ahead=False).draft is None
    packed = PackedTransformer(model)
    before = packed.nbytes
    assert packed.draft is not None and packed.nbytes > before


def test_samples_are_drawn_token_by_token():
    packed = Counting(tiny().eval())
    search(packed, {"beam_size": 1, "num_samples": 2})
    assert packed.plain > 0 and packed.steps == 0


def test_another_default_device_changes_nothing(monkeypatch):
    packed = Counting(tiny().eval())
    for options in ({"beam_size": 1}, {"beam_size": 3}):
        want = search(packed, options, monkeypatch=monkeypatch)
        with torch.device("meta"):
            assert_equal(search(packed, options), want)
    assert packed.steps > 0 and packed.draft is not None and packed.draft.output.bias.device.type == "cpu"


@pytest.mark.parametrize("beam_size", [1, 4])
def test_limits_that_are_no_numbers_of_tokens(beam_size):
    packed = Counting(tiny().eval())
    for limits in (torch.tensor([float("inf")] * 3), torch.tensor([3, 0, 4])):
        with pytest.raises(ValueError, match="max_lengths must be"):
            search(packed, {"beam_size": beam_size}, max_lengths=limits)


def test_no_sentences():
    found = generate(Counting(tiny().eval()), SOURCE[:0], LENGTHS[:0], SearchOptions(beam_size=1))
    assert found.tokens.shape[0] == 0


def test_how_far_it_looks(monkeypatch):
    monkeypatch.undo()
    assert [levels_for(1, beams) for beams in (1, 2, 3, 4, 5, 6, 8)] == [3, 3, 3, 2, 1, 1, 0]
    assert [levels_for(sentences, 1) for sentences in (1, 2, 3, 4)] == [3, 1, 0, 0]
    assert levels_for(2, 4) == 0 and width_for(1) == 1 and width_for(4) == 5


def test_the_pace():
    pace = Pace(3)
    pace.learn(3, 1)
    assert pace.ahead == 3
    pace.learn(3, 0)
    assert pace.ahead == 2
    pace.learn(2, 2)
    assert pace.ahead == 3
    for guessed in (3, 2, 1):
        pace.learn(guessed, 0)
    assert pace.ahead == 0
    without = 0
    while pace.ahead == 0:
        pace.learn(0, 0)
        without += 1
    assert without == guessing.FIRST_PAUSE and pace.ahead == 1
    pace.learn(1, 0)
    assert (pace.ahead, pace.left) == (0, 2 * guessing.FIRST_PAUSE)
    for _ in range(20):
        pace.learn(1, 0)
    assert pace.left == guessing.LONGEST_PAUSE
    pace.learn(1, 1)
    assert (pace.ahead, pace.pause) == (2, guessing.FIRST_PAUSE)
    still = Pace(0)
    still.learn(0, 0)
    assert still.ahead == 0


def test_what_it_is_to_a_search():
    packed = Counting(tiny().eval())
    memory = packed.encode(SOURCE, LENGTHS)
    step = LookingAhead(packed, memory, LENGTHS, 1, 9)
    assert isinstance(step, DeferringStep) and isinstance(step, RankedStep)


def test_lengths_that_lie_apart(monkeypatch):
    packed, apart = Counting(tiny().eval()), torch.stack([LENGTHS, LENGTHS + 50], 1).int()[:, 0]
    options = SearchOptions(beam_size=2)
    assert_equal(generate(packed, SOURCE, apart, options), generate(packed, SOURCE, LENGTHS, options))
    assert packed.steps > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    packed = Counting(tiny().eval())
    options = SearchOptions(beam_size=3)
    expected = generate(packed, SOURCE, LENGTHS, options)
    torch.set_default_dtype(dtype)
    try:
        found = generate(packed, SOURCE, LENGTHS, options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.tolist() == expected.tolist()


def test_a_table_whose_columns_lie_together():
    model = tiny().eval()
    expected = search(Counting(model), {"beam_size": 3})
    weight = model.source_embedding.weight
    weight.data = weight.data.t().contiguous().t()
    assert_equal(search(Counting(model), {"beam_size": 3}), expected)


def test_a_state_is_copied_after_a_step():
    packed = Counting(tiny().eval())
    state = packed.start(packed.encode(SOURCE, LENGTHS), LENGTHS)
    tokens = torch.full((len(SOURCE),), 5)
    packed.step(tokens, state)
    copied = copy.deepcopy(state)
    assert_equal(packed.step(tokens, copied), packed.step(tokens, state))
