"""Philox4x32-10 against its authors' known answers and against a plain-Python generator written here."""

import doctest

import numpy as np
import pytest
import torch

from foveate.kernels.sampling import philox, reference

RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter, key):
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        (hi0, lo0), (hi1, lo1) = divmod(0xD2511F53 * a, 2**32), divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = hi1 ^ b ^ k0, lo1, hi0 ^ d ^ k1, lo0
    return a, b, c, d


def plain_word(seed, step, token):
    return plain_philox((token // 4, step, 0, 0), (seed % 2**32, seed % 2**64 >> 32))[token % 4]


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_random123_vectors(counter, key, expected):
    assert plain_philox(counter, key) == expected
    assert philox.philox4x32(counter, key) == expected
    tensors = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in tensors) == expected


def test_docstring_answers():
    assert doctest.testmod(philox) == (0, 3)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**64 + 5, 0x123456789ABCDEF0, -(2**70)])
@pytest.mark.parametrize("index", [0, 1, 7, 2**32 - 1])
def test_derived_seeds(seed, index):
    key = (seed % 2**32, seed % 2**64 // 2**32)
    for function, domain in ((philox.sample_seed, 0xF0), (philox.request_seed, 0xF1)):
        low, high, _, _ = plain_philox((index, 0, 0, domain), key)
        assert function(seed, index) == low + 2**32 * high


@pytest.mark.parametrize("index", [-1, 2**32])
def test_derived_seed_index_out_of_range(index):
    with pytest.raises(ValueError, match=r"expected 0 <= index < 2\^32, got"):
        philox.sample_seed(0, index)


SEEDS = [0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF, -0x0123456789ABCDEF]
STEPS = [0, 1, 2, 2**32 - 1, 5, 1000, 3]


# 5 counters a block: several blocks a row, with a remainder; 13: a row and a part of the next; 10**6: one block.
@pytest.mark.parametrize("block", [5, 13, 10**6])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 8), (1, 4), (7, 43), (3, 48), (7, 1), (2, 50)])
def test_noise_words(monkeypatch, block, rows, vocab):
    monkeypatch.setattr(philox, "_BLOCK", block)
    seeds, steps = torch.tensor(SEEDS[:rows], dtype=torch.int64), torch.tensor(STEPS[:rows], dtype=torch.int64)
    words = philox.noise_words(seeds, steps, vocab)
    assert words.dtype == torch.int32
    padded = range(-(-vocab // 4) * 4)
    expected = [[plain_word(seed, step, token) for token in padded] for seed, step in zip(SEEDS, STEPS, strict=True)]
    assert (words.long() & 0xFFFFFFFF).tolist() == expected[:rows]


def test_noise_words_of_a_huge_row():
    vocab = 4 * (philox._BLOCK * torch.get_num_threads() + 3)
    words = philox.noise_words(torch.tensor([9]), torch.tensor([4]), vocab)[0]
    for token in (0, vocab // 2 + 1, vocab - 17, vocab - 12, vocab - 5, vocab - 1):
        assert words[token].item() % 2**32 == plain_word(9, 4, token)


def test_noise_is_accurate_and_finite_everywhere():
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    words = edges + [int(x) for x in rng.integers(0, 2**32, 2000)]
    noise = reference.gumbel(torch.tensor(words)).double().numpy()
    exact = -np.log(-np.log1p(-(2**32 - np.array(words) - 0.5) / 2**32))  # 1 - u without cancellation
    # The contract lets g differ by 4 ulp; near g = 0 (e near 1) that is an ulp of 1, the argument of the log.
    assert np.all(np.abs(noise - exact) <= 4 * np.spacing(np.maximum(np.abs(exact), 1).astype(np.float32)))
    assert exact.max() < 22.88
    assert exact.min() > -3.14


def test_the_race_bound_holds_for_every_word():
    complements = np.append(2.0 ** np.linspace(-33, -1e-9, 4001), 1 - 2.0**-33)
    ratio = -np.log1p(-complements) / complements
    assert ratio.min() >= 1
    assert ratio.max() < 22.9 < reference._RACE_RATIO
