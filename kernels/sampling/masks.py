"""Allowed ids as bits, as xgrammar and llguidance have them: bit i % 32 of int32 word i // 32 is set for id i."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from foveate.kernels.dispatch import require

BITS = 32


def num_words(vocab: int) -> int:
    """Words of a row: ceil(vocab / 32)."""
    return -(-vocab // BITS)


def of_ids(ids: Iterable[int], vocab: int) -> torch.Tensor:
    """int32 [ceil(vocab / 32)] on the CPU: the bits of these ids, each in [0, vocab)."""
    index = np.fromiter(ids, np.int64)
    fits = not len(index) or (index.min() >= 0 and index.max() < vocab)
    require(fits, f"ids in [0, {vocab})", index[:9].tolist(), "ids")
    words = np.zeros(num_words(vocab), np.uint32)
    np.bitwise_or.at(words, index // BITS, np.uint32(1) << (index % BITS).astype(np.uint32))
    return torch.from_numpy(words.view(np.int32))


def has(words: torch.Tensor, token: int) -> bool:
    """Whether the bit of an id is set in int32 [W]."""
    return bool(words[token // BITS] >> token % BITS & 1)


def pack(allowed: torch.Tensor) -> torch.Tensor:
    """bool [..., V] -> int32 [..., ceil(V / 32)]; the bits beyond V are 0."""
    require(allowed.dtype == torch.bool and allowed.dim() > 0, "bool [..., V]", str(allowed.dtype), "allowed")
    vocab = allowed.shape[-1]
    if allowed.device.type == "cpu":
        return _pack_on_cpu(allowed.numpy())
    padded = torch.nn.functional.pad(allowed, (0, num_words(vocab) * BITS - vocab))
    values = torch.ones((), dtype=torch.int32, device=allowed.device) << torch.arange(BITS, device=allowed.device)
    bits = padded.unflatten(-1, (-1, BITS)).to(torch.int32) * values.to(torch.int32)
    return bits.sum(-1, dtype=torch.int32)  # bit 31 is the sign: the sum wraps as it must


def _pack_on_cpu(allowed: np.ndarray) -> torch.Tensor:
    """`pack` of a numpy array: torch takes tens of times as long, more than a draw does."""
    packed = np.packbits(allowed, axis=-1, bitorder="little")
    octets = np.zeros((*allowed.shape[:-1], num_words(allowed.shape[-1]) * BITS // 8), np.uint8)
    octets[..., : packed.shape[-1]] = packed
    return torch.from_numpy(octets.view("<i4").astype(np.int32, copy=False))


def unpack(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """int32 [..., ceil(V / 32)] -> bool [..., V]; bits beyond V do not count."""
    require(
        words.dtype == torch.int32 and words.dim() > 0 and words.shape[-1] == num_words(vocab),
        f"int32 [..., {num_words(vocab)}]", f"{words.dtype} {list(words.shape)}", "allowed",
    )  # fmt: skip
    shifts = torch.arange(BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 1).flatten(-2)[..., :vocab].bool()
