"""SearchOptions: what each option may be."""

from __future__ import annotations

import dataclasses
import math

import numpy
import pytest
import torch

from fused_transformer import SearchOptions
from fused_transformer.search_options import INTEGERS, MAY_BE_NONE, NUMBERS, SWITCHES

OF_SAMPLING = ("temperature", "top_k", "top_p")
REAL = dict.fromkeys(INTEGERS, 3) | {"top_beams": 2, "length_penalty": 0.5, "patience": 1.5}
REAL |= {"temperature": 0.5, "top_p": 0.5}


def made(name, value):
    return SearchOptions(**{name: value} | ({"num_samples": 2} if name in OF_SAMPLING else {}))


def test_every_option_is_of_one_kind():
    others = {"penalty", "suppress_tokens"}
    assert {*INTEGERS, *NUMBERS, *SWITCHES} | others == {field.name for field in dataclasses.fields(SearchOptions)}


@pytest.mark.parametrize("value", [2.5, 2.0, True, False, "2", (2,), math.nan, numpy.float32(2)], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_whole_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be an int, got "):
        made(name, value)


@pytest.mark.parametrize("value", ["a", "1", True, (1.0,), 1j], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be a number, got "):
        made(name, value)


@pytest.mark.parametrize("value", [1, 0, "yes", 1.0], ids=repr)
@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_not_true_or_false_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be True or False, got "):
        made(name, value)


@pytest.mark.parametrize("name", sorted({*INTEGERS, *NUMBERS, *SWITCHES} - {*MAY_BE_NONE}))
def test_none_is_for_three_options(name):
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got None"):
        made(name, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1.5,), "a token of suppress_tokens must be an int, got 1.5"),
        ((4, True), "a token of suppress_tokens must be an int, got True"),
        ("12", "a token of suppress_tokens must be an int, got '1'"),
        (5, "suppress_tokens must be token numbers, got 5"),
        (None, "suppress_tokens must be token numbers, got None"),
    ],
)
def test_suppressed_tokens_are_numbers(value, message):
    with pytest.raises(TypeError, match=message):
        SearchOptions(suppress_tokens=value)


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_of_other_libraries_become_ints(name):
    for kind in (numpy.int64, numpy.uint8, torch.tensor):
        options = made(name, kind(REAL[name]))
        assert type(getattr(options, name)) is int
        assert options == made(name, REAL[name]) and hash(options) == hash(made(name, REAL[name]))


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_become_floats(name):
    for value in (1, numpy.float32(REAL[name]), numpy.float64(REAL[name]), numpy.int32(1), torch.tensor(1.0)):
        assert type(getattr(made(name, value), name)) is float
    assert made(name, numpy.float32(REAL[name])) == made(name, REAL[name])


def test_suppressed_tokens_become_ints():
    for tokens in ([3, 4], numpy.array([3, 4]), torch.tensor([3, 4]), range(3, 5), (x for x in (3, 4))):
        assert SearchOptions(suppress_tokens=tokens) == SearchOptions(suppress_tokens=(3, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite_are_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        made(name, value)


def test_a_patience_beyond_all_numbers_is_out_of_range():
    with pytest.raises(ValueError, match="patience must be finite and positive, got 1e\\+308"):
        SearchOptions(patience=1e308)
