"""Decoding one token at a time equals decoding all at once."""

from __future__ import annotations

import pytest
import torch

from fused_transformer import PackedTransformer
from tests.oracle import assert_equal
from tests.transformer.models import LENGTHS, SOURCE, VARIANTS, VOCAB, tiny


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_decoding_all_at_once(variant):
    model = tiny(**VARIANTS[variant]).eval()
    length = 40 if variant == "post_norm" else 4  # 40: beyond the state's first capacity
    target = torch.randint(3, VOCAB, (3, length))
    memory = model.encode(SOURCE)
    state = model.start(memory, LENGTHS)
    got = torch.stack([model.step(target[:, i], state) for i in range(length)], dim=1)
    torch.testing.assert_close(got, model.decode(target, memory, LENGTHS), atol=1e-5, rtol=1e-5)
    without_lengths = model.start(memory)
    torch.testing.assert_close(model.step(target[:, 0], without_lengths), model.decode(target[:, :1], memory)[:, 0])


def test_reordered_and_selected_rows_go_on_from_their_own_history():
    model = tiny().eval()
    memory, beams = model.encode(SOURCE), 2
    tokens = torch.randint(3, VOCAB, (6, 40))
    state = model.start(memory, LENGTHS, beam_size=beams)
    rows, kept, kept_rows = torch.tensor([1, 0, 2, 2, 5, 5]), torch.tensor([0, 2]), torch.tensor([0, 1, 4, 5])
    for i in range(40):
        if i in (5, 6, 34):
            state.reorder(rows)
            tokens = torch.cat([tokens[rows, :i], tokens[:, i:]], dim=1)
        if i == 36:
            state.select(kept)
            tokens = tokens[kept_rows]
        hidden = model.step(tokens[:, i], state)
    expected = model.decode(tokens, memory[kept].repeat_interleave(beams, 0), LENGTHS[kept].repeat_interleave(beams, 0))
    torch.testing.assert_close(hidden, expected[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_begin_as_one_go_on_as_if_each_had_been_computed(packed):
    model = tiny().eval()
    same = assert_equal if packed else torch.testing.assert_close  # torch's products differ with the rows beside
    if packed:
        model = PackedTransformer(model)
    memory, tokens = model.encode(SOURCE, LENGTHS), torch.randint(3, VOCAB, (6, 40))
    tokens[:, 0] = tokens[:1, 0]
    together, apart = (model.start(memory, LENGTHS, beam_size=2) for _ in range(2))
    together.begin_as_one()
    first = model.step(tokens[::2, 0], together)
    together.split(2)
    same(first.repeat_interleave(2, 0), model.step(tokens[:, 0], apart))
    assert (together.rows, together.beam_size, together.length) == (6, 2, 1)
    rows = torch.tensor([1, 0, 2, 2, 5, 5])
    for i in range(1, 40):  # beyond the first capacity
        if i in (1, 3, 33):
            for state in (together, apart):
                state.reorder(rows)
        if i == 35:
            for state in (together, apart):
                state.select(torch.tensor([2, 0]))
            tokens = tokens[:4]
        same(model.step(tokens[:, i], together), model.step(tokens[:, i], apart))


def test_what_is_computed_stays_where_it_is():
    """Reordering and leaving sequences out moves neither the cache nor the memory."""
    model = tiny().eval()
    state = model.start(model.encode(SOURCE), LENGTHS, beam_size=2)
    model.step(torch.randint(3, VOCAB, (6,)), state)
    cache, memory = state.cache.clone(), [x.clone() for layer in state.memory for x in layer]
    places = state.cache.data_ptr(), [x.data_ptr() for layer in state.memory for x in layer]
    state.reorder(torch.tensor([1, 1, 3, 2, 5, 4]))
    state.select(torch.tensor([2, 0]))
    assert (state.rows, state.sources.tolist(), state.memory_lengths.tolist()) == (4, [2, 0], [5, 6])
    assert state.ancestors[:, 0].tolist() == [5, 4, 1, 1]
    assert places == (state.cache.data_ptr(), [x.data_ptr() for layer in state.memory for x in layer])
    assert_equal([cache, *memory], [state.cache, *(x for layer in state.memory for x in layer)])


def test_wrong_uses_of_the_state_are_errors():
    model = tiny()
    memory = model.encode(SOURCE)
    with pytest.raises(ValueError, match="call eval"):
        model.start(memory)
    model.eval()
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        model.start(memory, beam_size=0)
    with pytest.raises(ValueError, match=r"rows must have shape \(6,\)"):
        model.start(memory, beam_size=2).reorder(torch.tensor([0, 1]))
    state = model.start(memory, beam_size=2)
    with pytest.raises(ValueError, match="6 rows can't be split 2 times in a cache for 6"):
        state.split(2)
    state.begin_as_one()
    with pytest.raises(ValueError, match="3 rows can't be split 3 times in a cache for 6"):
        state.split(3)
    model.step(torch.randint(3, VOCAB, (3,)), state)
    with pytest.raises(ValueError, match="there are 1 positions"):
        state.begin_as_one()
