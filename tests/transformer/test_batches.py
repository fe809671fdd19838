"""Batches: every sentence once an epoch, within the token limit, in an order that a position restores."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fused_transformer.batches import Corpus, Ragged, TokenBatches, cut_by_tokens


def random_corpus(pairs=300, longest=30):
    source = [[random.randint(4, 99) for _ in range(random.randint(1, longest))] for _ in range(pairs)]
    target = [[random.randint(4, 99) for _ in range(random.randint(1, longest))] for _ in range(pairs)]
    return Corpus(source, target), source, target


def one_epoch(batches):
    epoch = batches.epoch
    found = []
    while True:
        rows = next(batches)
        if batches.epoch != epoch:
            return found
        found.append(rows)


def test_a_batch_is_padded_and_framed():
    corpus = Corpus([[5, 6], [7]], [[8], [9, 10, 11]])
    batch = corpus.batch(torch.tensor([1, 0]))
    assert batch.source.tolist() == [[7, 2, 0], [5, 6, 2]]
    assert batch.source_lengths.tolist() == [2, 3]
    assert batch.target.tolist() == [[1, 9, 10, 11, 2], [1, 8, 2, 0, 0]]
    assert batch.target_lengths.tolist() == [4, 2], "of what goes into the decoder"
    assert batch.source.dtype == torch.int64


def test_ragged_gives_back_what_went_in():
    sequences = [[random.randint(0, 9) for _ in range(random.randint(0, 7))] for _ in range(50)]
    ragged = Ragged(sequences)
    rows = torch.randperm(50)
    padded = ragged.padded(rows, padding_idx=77)
    for row, line in zip(rows.tolist(), padded.tolist(), strict=True):
        assert line == sequences[row] + [77] * (len(line) - len(sequences[row]))
    assert ragged.padded(torch.tensor([], dtype=torch.int64), 0).shape == (0, 0)
    assert Ragged([[]]).padded(torch.tensor([0]), 0).shape == (1, 0)


def test_an_epoch_has_every_pair_once_and_the_next_another_order():
    corpus, _, _ = random_corpus()
    batches = TokenBatches(corpus, 200, pool_size=64)
    first = one_epoch(batches)
    assert sorted(torch.cat(first).tolist()) == list(range(300))
    batches.load_state_dict({"epoch": 1, "position": 0})
    second = one_epoch(batches)
    assert sorted(torch.cat(second).tolist()) == list(range(300))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()


def test_batches_keep_to_the_limit_and_fill_it():
    corpus, _, _ = random_corpus()
    sizes, real = [], 0
    for rows in one_epoch(TokenBatches(corpus, 200)):
        batch = corpus.batch(rows)
        assert batch.source.numel() <= 200 and batch.target.numel() <= 200
        sizes.append(max(batch.source.numel(), batch.target.numel()))
        real += int(batch.target_lengths.sum()) + len(rows)
    assert sorted(sizes)[len(sizes) // 2] > 150
    padded = sum(corpus.batch(rows).target.numel() for rows in one_epoch(TokenBatches(corpus, 200)))
    assert real / padded > 0.9, "sorted by length there is little padding"


def test_the_seed_decides_the_order():
    corpus, _, _ = random_corpus()

    def order(seed):
        return [rows.tolist() for rows in itertools.islice(TokenBatches(corpus, 200, seed=seed), 40)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("done", [0, 1, 7, "whole epoch", "into the second"])
def test_a_position_restores_the_order(done):
    corpus, _, _ = random_corpus()
    batches = TokenBatches(corpus, 200, seed=3)
    epoch = len(one_epoch(TokenBatches(corpus, 200, seed=3)))
    done = {"whole epoch": epoch, "into the second": epoch + 5}.get(done, done)
    for _ in range(done):
        next(batches)
    state = batches.state_dict()
    expected = [next(batches).tolist() for _ in range(epoch + 3)]
    restored = TokenBatches(corpus, 200, seed=3)
    restored.load_state_dict(state)
    assert [next(restored).tolist() for _ in range(epoch + 3)] == expected


def test_the_fingerprint_tells_texts_apart():
    corpus = Corpus([[5, 6], [7]], [[8], [9]])
    assert corpus.fingerprint() == Corpus([[5, 6], [7]], [[8], [9]]).fingerprint()
    assert corpus.fingerprint() != Corpus([[5], [6, 7]], [[8], [9]]).fingerprint()
    assert corpus.fingerprint() != Corpus([[5, 6], [7]], [[8], [10]]).fingerprint()


def test_cutting_nothing_gives_nothing():
    assert cut_by_tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64), 5) == []


def test_refused_arguments():
    corpus = Corpus([[5, 6, 7]], [[8]])
    with pytest.raises(ValueError, match="a sentence has 4 tokens, more than max_tokens, 3"):
        TokenBatches(corpus, 3)
    with pytest.raises(ValueError, match="no sentence pairs"):
        TokenBatches(Corpus([], []), 3)
    with pytest.raises(ValueError, match="pool_size must be at least 1"):
        TokenBatches(corpus, 10, pool_size=0)
    with pytest.raises(ValueError, match="equally many sentences, got 1 and 2"):
        Corpus([[5]], [[5], [6]])
    with pytest.raises(ValueError, match="lines must have a number for each of 1 pairs, got 2"):
        Corpus([[5]], [[5]], lines=[1, 2])
    with pytest.raises(ValueError, match="epoch 0 has 1 batches, so none at 9"):
        TokenBatches(corpus, 10).load_state_dict({"epoch": 0, "position": 9})
