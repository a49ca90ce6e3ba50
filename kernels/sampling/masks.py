"""Allowed ids as bits, as xgrammar and llguidance have them: bit i % 32 of int32 word i // 32 is set for id i."""

from __future__ import annotations

import torch

from foveate.kernels.dispatch import require

BITS = 32


def num_words(vocab: int) -> int:
    """Words of a row: ceil(vocab / 32)."""
    return -(-vocab // BITS)


def pack(allowed: torch.Tensor) -> torch.Tensor:
    """bool [..., V] -> int32 [..., ceil(V / 32)]; the bits beyond V are 0."""
    require(allowed.dtype == torch.bool and allowed.dim() > 0, "bool [..., V]", str(allowed.dtype), "allowed")
    vocab = allowed.shape[-1]
    padded = torch.nn.functional.pad(allowed, (0, num_words(vocab) * BITS - vocab))
    values = torch.ones((), dtype=torch.int32, device=allowed.device) << torch.arange(BITS, device=allowed.device)
    bits = padded.unflatten(-1, (-1, BITS)).to(torch.int32) * values.to(torch.int32)
    return bits.sum(-1, dtype=torch.int32)  # bit 31 is the sign: the sum wraps as it must


def unpack(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """int32 [..., ceil(V / 32)] -> bool [..., V]; bits beyond V do not count."""
    require(
        words.dtype == torch.int32 and words.dim() > 0 and words.shape[-1] == num_words(vocab),
        f"int32 [..., {num_words(vocab)}]", f"{words.dtype} {list(words.shape)}", "allowed",
    )  # fmt: skip
    shifts = torch.arange(BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 1).flatten(-2)[..., :vocab].bool()
