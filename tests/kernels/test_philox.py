"""The dropout bits: against the generator's published known answers, and as the op contract defines them."""

from __future__ import annotations

import random

import pytest
import torch

from fused_transformer.kernels import _philox, attention, use_backend

# philox4x32, 10 rounds: counter, key, result. The known answers published with Salmon et al. 2011 (Random123,
# kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """The generator in Python's own integers, as the paper's figure draws it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def as_seed(key) -> torch.Tensor:
    unsigned = key[0] | key[1] << 32
    return torch.tensor([unsigned - 2**64 if unsigned >= 2**63 else unsigned])


def words(seed, outer, row, col):
    return _philox.words(seed, *(torch.as_tensor(x, dtype=torch.int64) for x in (outer, row, col)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_known_answers(counter, key, expected):
    assert philox(counter, key) == expected


def test_the_torch_version_is_the_generator():
    assert tuple(words(torch.tensor([0]), 0, 0, [0, 1, 2, 3]).tolist()) == KNOWN_ANSWERS[0][2]
    draw = random.Random(20110).getrandbits
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    for trial in range(200):
        block, row, outer = (edges[draw(8) % 5] if trial % 2 else draw(32) for _ in range(3))
        key = (draw(32), draw(32)) if trial % 3 else (edges[draw(8) % 5], edges[draw(8) % 5])
        cols = [4 * block + lane for lane in range(4)]
        assert tuple(words(as_seed(key), outer, row, cols).tolist()) == philox((block, row, outer, 0), key)


def test_positions_broadcast():
    seed = torch.tensor([5])
    outer, row, col = torch.arange(2)[:, None, None], torch.arange(3)[:, None], torch.arange(9)
    together = _philox.words(seed, outer, row, col)
    assert together.shape == (2, 3, 9)
    for i, j, k in ((0, 0, 0), (1, 2, 8), (0, 1, 4)):
        assert together[i, j, k] == words(seed, i, j, k)


def test_an_element_does_not_depend_on_the_shape_around_it():
    seed = torch.tensor([99])
    assert torch.equal(_philox.keep_rows(seed, 0.5, 64, 129)[:7, :33], _philox.keep_rows(seed, 0.5, 7, 33))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_kept_fraction_is_that_of_a_fair_draw(dropout_p):
    count = 512 * 512
    kept = _philox.keep_rows(torch.tensor([1234]), dropout_p, 512, 512)
    deviation = (dropout_p * (1 - dropout_p) / count) ** 0.5
    assert abs(kept.double().mean().item() - (1 - dropout_p)) < 4 * deviation
    # and rows, columns and word lanes do not differ more than chance lets them
    for part in (kept.double().mean(0), kept.double().mean(1)):
        spread = ((part - (1 - dropout_p)) ** 2).mean().sqrt().item()
        assert spread == pytest.approx((dropout_p * (1 - dropout_p) / 512) ** 0.5, rel=0.15)


def test_nothing_is_dropped_at_0_and_all_is_nothing_at_1():
    assert bool(_philox.keep_rows(torch.tensor([3]), 0.0, 64, 64).all())
    assert not bool(_philox.keep_rows(torch.tensor([3]), 1.0, 64, 64).any())
    assert [_philox.keep_scale(p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.0, 0.0]
    assert [_philox.threshold(p) for p in (0.0, 0.5, 1.0)] == [0, 2**31, 2**32 - 1]


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 62, 63])
def test_every_bit_of_the_seed_counts(bit):
    position = (0, torch.arange(64)[:, None], torch.arange(64))
    other = as_seed(((1 << bit) & 0xFFFFFFFF, (1 << bit) >> 32))
    differs = words(torch.tensor([0]), *position) ^ words(other, *position)
    flipped = sum(((differs >> i) & 1).sum().item() for i in range(32)) / (differs.numel() * 32)
    assert flipped == pytest.approx(0.5, abs=0.01)


def test_neighbours_draw_apart():
    seed = torch.tensor([77])
    here = words(seed, 0, torch.arange(64)[:, None], torch.arange(64))
    assert here.unique().numel() > 0.999 * here.numel()
    assert not torch.equal(here, words(seed, 1, torch.arange(64)[:, None], torch.arange(64)))
    assert not torch.equal(here, here.T)


def test_manual_seed_governs_new_seeds():
    torch.manual_seed(11)
    first, second = _philox.new_seed(torch.device("cpu")), _philox.new_seed(torch.device("cpu"))
    torch.manual_seed(11)
    again = _philox.new_seed(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_compiled_kernels_drop_the_same_elements():
    batch, heads, length, keys = 2, 3, 5, 37
    q, k = torch.randn(batch, heads, length, keys), torch.randn(batch, heads, keys, keys)
    v = torch.eye(keys).expand(batch, heads, keys, keys)  # so that the output is the weights themselves
    seed = torch.tensor([-(2**63) + 12345])
    with use_backend("cpu"):
        dropped = attention(q, k, v, dropout_p=0.4, seed=seed) == 0
    outer = torch.arange(batch * heads).view(batch, heads, 1, 1)
    row, col = torch.arange(length)[:, None], torch.arange(keys)
    assert torch.equal(~dropped, _philox.keep_mask(seed, 0.4, outer, row, col))
