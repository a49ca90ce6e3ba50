"""Philox4x32-10, the counter-based generator behind every draw, and the seeds derived from it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. One round of the
counter (c0, c1, c2, c3) under the key (k0, k1), all words of 32 bits:

    p0 = 0xD2511F53 * c0,  p1 = 0xCD9E8D57 * c2
    (c0, c1, c2, c3) <- (hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0))
    (k0, k1) <- (k0 + 0x9E3779B9, k1 + 0xBB67AE85)   after the round

Ten rounds. Words are held in int64: a product wraps to the two's complement of its 64 bits, whose halves a
shift and a mask give back exactly.
"""

from __future__ import annotations

from typing import TypeVar

import torch

ROUNDS = 10
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
SAMPLE_SEED_DOMAIN = 0xF0
REQUEST_SEED_DOMAIN = 0xF1

# Counters a thread works on at a time: few enough for its caches, enough to outweigh torch's cost per operation.
_BLOCK = 32768

Words = TypeVar("Words", int, torch.Tensor)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Philox4x32-10 of `counter` under `key`: four words in [0, 2^32).

    The words are Python ints, or int64 tensors (values in [0, 2^32)) of shapes that broadcast.

    >>> ["%08x" % word for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & MASK, ((p0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def sample_seed(request_seed: int, sample_index: int) -> int:
    """Seed of one sample of a request, an unsigned 64-bit int.

    c0 | c1 << 32 of Philox(counter = (sample_index, 0, 0, 0xF0), key = request_seed mod 2^64).

    >>> hex(sample_seed(0, 0)), hex(sample_seed(-1, 5))
    ('0x9cf3ab71f964d192', '0x914f997ff1878dd9')
    """
    return _derived_seed(request_seed, sample_index, SAMPLE_SEED_DOMAIN)


def request_seed(engine_seed: int, request_index: int) -> int:
    """Seed of a request that brought none, an unsigned 64-bit int; request_index counts the requests added before.

    c0 | c1 << 32 of Philox(counter = (request_index, 0, 0, 0xF1), key = engine_seed mod 2^64).

    >>> hex(request_seed(0, 0)), hex(request_seed(1234, 7))
    ('0x975a826a8856d958', '0xbf2e69721c0f99ce')
    """
    return _derived_seed(engine_seed, request_index, REQUEST_SEED_DOMAIN)


def _derived_seed(seed: int, index: int, domain: int) -> int:
    if not 0 <= index <= MASK:
        raise ValueError(f"expected 0 <= index < 2^32, got {index} (index)")
    c0, c1, _, _ = philox4x32((index, 0, 0, domain), (seed & MASK, (seed >> 32) & MASK))
    return c0 | c1 << 32


def noise_words(seeds: torch.Tensor, steps: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise word of every token: lane (id mod 4) of Philox(counter = (id // 4, step, 0, 0), key = seed).

    seeds (two's complement of the unsigned seed), steps: int64 [N]. Returns int32 [N, vocab rounded up to a multiple
    of 4], column = token id, the two's complement of the word.
    """
    rows, width = len(seeds), -(-vocab // 4)
    lanes = torch.empty(rows, width, 4, dtype=torch.int32, device=seeds.device)
    keys = _round_keys(seeds)
    ids = torch.arange(width, device=seeds.device)
    block = _BLOCK * torch.get_num_threads()
    num_cols = min(width, block)
    num_rows = max(1, min(rows, block // num_cols))
    buffers = torch.empty(3, 2 * num_rows * num_cols, dtype=torch.int64, device=seeds.device)
    for row in range(0, rows, num_rows):
        for col in range(0, width, num_cols):
            cols, chunk = slice(col, col + num_cols), slice(row, row + num_rows)
            words = _block_words(ids[cols], steps[chunk], keys[:, :, chunk], buffers)
            for lane, word in enumerate(words):
                lanes[chunk, cols, lane] = word
    return lanes.view(rows, width * 4)


def _round_keys(seeds: torch.Tensor) -> torch.Tensor:
    """int64 [ROUNDS, 2, N, 1]: the words (k1, k0) of every round, in the order in which the products need them."""
    increments = torch.tensor(KEY_INCREMENTS[::-1], device=seeds.device)[:, None]
    first = torch.stack([(seeds >> 32) & MASK, seeds & MASK])
    rounds = torch.arange(ROUNDS, device=seeds.device)[:, None, None]
    return ((first + rounds * increments) & MASK)[..., None]


def _block_words(
    ids: torch.Tensor, steps: torch.Tensor, keys: torch.Tensor, buffers: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The four words of counters (id, step, 0, 0), int64 [R, C] each, in place in `buffers` (int64 [3, >= 2 R C]).

    Their low 32 bits are the words. ids: [C]. steps: [R]. keys: [ROUNDS, 2, R, 1]. `state` holds (c2, c0), so that
    both products, both shifts and both xors are one operation each: the high half of p0 meets c3 = lo(old p0) and
    that of p1 meets c1 = lo(old p1). Only a factor needs clean high bits.
    """
    rows, cols = len(steps), len(ids)
    state, products, previous = (b[: 2 * rows * cols].view(2, rows, cols) for b in buffers)
    state[0], state[1] = 0, ids
    previous[0], previous[1] = 0, steps[:, None]
    for key in keys:
        torch.mul(state[1], MULTIPLIERS[0], out=products[0])
        torch.mul(state[0], MULTIPLIERS[1], out=products[1])
        torch.bitwise_right_shift(products, 32, out=state)
        state.bitwise_xor_(previous).bitwise_xor_(key).bitwise_and_(MASK)
        products, previous = previous, products
    return state[1], previous[1], state[0], previous[0]
