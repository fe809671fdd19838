"""advance_beams: the native call against plain torch, over ties, hypotheses that are none, and what ends."""

from __future__ import annotations

import pytest
import torch

from fused_transformer.kernels import beams, log_softmax_top_k, use_backend
from fused_transformer.kernels.beams import Alive, Continuations, advance_beams
from tests.oracle import assert_equal

EOS, VOCABULARY = 2, 11


def make(sentences: int, k: int, tokens: int, missing: int = 0) -> Alive:
    """`missing` of each sentence's hypotheses are none."""
    scores = -torch.rand(sentences, k, dtype=torch.float64).cumsum(1) * 100
    scores[:, k - missing :] = -torch.inf
    history = torch.randint(3, VOCABULARY, (sentences, k, 1 + tokens))
    return Alive(scores, (scores - scores[:, :1]).float(), history, -torch.rand(sentences, k, tokens))


def both(alive: Alive, values, places) -> beams.Advanced:
    native = advance_beams(alive, values, places, vocabulary=VOCABULARY, eos_idx=EOS)
    assert_equal(native, beams._plain(alive, values, places, VOCABULARY, EOS))
    return native


def best(alive: Alive, logits) -> tuple[torch.Tensor, torch.Tensor]:
    k = alive.scores.shape[1]
    return log_softmax_top_k(logits, 2 * k, beams=k, addend=alive.behind.flatten())


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize(("sentences", "k", "tokens"), [(1, 4, 0), (3, 2, 7), (64, 4, 30), (2, 5, 1)])
def test_the_native_call_is_plain_torch(sentences, k, tokens, missing):
    alive = make(sentences, k, tokens, missing)
    logits = torch.randn(sentences * k, VOCABULARY)
    values, places = best(alive, logits)
    found = both(alive, values, places)
    following, continuations = found.alive, Continuations.of(alive, values, places, VOCABULARY)
    assert not found.nan and not found.hopeless and found.ended == bool((continuations.token == EOS).any())
    assert following.tokens.shape == (sentences, k, tokens + 2) and (following.tokens[..., -1] != EOS).all()
    assert (following.scores.diff(dim=1) <= 0).all()
    # By hand, of the first sentence: the likeliest continuation that is not eos.
    each = alive.scores[0][:, None] + logits[:k].double().log_softmax(-1)
    each[:, EOS] = -torch.inf
    parent, token = divmod(int(each.argmax()), VOCABULARY)
    assert int(found.parents[0]) == parent and following.tokens[0, 0].tolist() == [*alive.tokens[0, parent], token]
    assert float(following.scores[0, 0]) == pytest.approx(float(each.max()), rel=1e-6)
    assert float(following.log_probs[0, 0, -1]) == pytest.approx(float(each.max() - alive.scores[0, parent]), rel=1e-3)


def test_of_equal_ones_the_first():
    alive = make(2, 2, 3)._replace(behind=torch.zeros(2, 2))
    values = torch.tensor([[-1.0, -2.0, -2.0, -2.0], [-1.0, -1.0, -1.0, -5.0]])
    places = torch.tensor([[EOS, 5, 4, VOCABULARY + 5], [VOCABULARY + EOS, 9, VOCABULARY, 3]])
    found = both(alive, values, places)
    assert found.ended and found.alive.tokens[..., -1].tolist() == [[5, 4], [9, 0]]
    assert found.parents.tolist() == [0, 0, 2, 3]


def test_where_too_few_go_on():
    """What ends, and what is none, comes last, as it comes; with no way on the sentence is hopeless."""
    alive = make(2, 2, 1)
    values = torch.tensor([[-1.0, -2.0, -torch.inf, -torch.inf], [-1.0, -torch.inf, -torch.inf, -torch.inf]])
    places = torch.tensor([[EOS, 7, 3, VOCABULARY + 4], [VOCABULARY + EOS, 0, 1, 3]])
    found = both(alive, values, places)
    assert found.hopeless and found.alive.scores.isinf().tolist() == [[False, True], [True, True]]
    assert found.alive.tokens[..., -1].tolist() == [[7, EOS], [EOS, 0]]


def test_nan_is_told():
    alive = make(2, 2, 1)
    logits = torch.randn(4, VOCABULARY)
    logits[3, 4] = torch.nan
    found = advance_beams(alive, *best(alive, logits), vocabulary=VOCABULARY, eos_idx=EOS)
    assert found.nan and beams._plain(alive, *best(alive, logits), VOCABULARY, EOS).nan


def test_a_place_beyond_the_hypotheses():
    alive = make(1, 2, 1)
    with pytest.raises(ValueError, match="a place must be below 22, got 22"):
        advance_beams(alive, torch.zeros(1, 4), torch.tensor([[0, 1, 2 * VOCABULARY, 4]]), vocabulary=11, eos_idx=EOS)


def test_float64_and_a_forced_backend_take_plain_torch():
    alive = make(3, 2, 4)
    values, places = best(alive, torch.randn(6, VOCABULARY, dtype=torch.float64))
    assert values.dtype == torch.float64
    both(alive, values, places)
    expected = advance_beams(alive, values.float(), places, vocabulary=VOCABULARY, eos_idx=EOS)
    with use_backend("reference"):
        assert_equal(advance_beams(alive, values.float(), places, vocabulary=VOCABULARY, eos_idx=EOS), expected)


def test_sentences_that_left_a_view_behind():
    """Strides of a slice: the same numbers."""
    alive = make(4, 2, 3)
    every = Alive(*(torch.stack([x, x + 1], 1)[:, 0] for x in alive))
    values, places = best(alive, torch.randn(8, VOCABULARY))
    expected = both(alive, values, places)
    assert_equal(advance_beams(every, values, places, vocabulary=VOCABULARY, eos_idx=EOS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_histories_of_another_dtype_take_plain_torch(dtype):
    alive = make(3, 2, 4)
    values, places = best(alive, torch.randn(6, VOCABULARY))
    expected = advance_beams(alive, values, places, vocabulary=VOCABULARY, eos_idx=EOS)
    other = alive._replace(log_probs=alive.log_probs.to(dtype))
    found = advance_beams(other, values, places, vocabulary=VOCABULARY, eos_idx=EOS)
    assert_equal(found.alive.scores, expected.alive.scores)
    assert_equal(found.alive.log_probs[..., -1], expected.alive.log_probs[..., -1].to(dtype))
