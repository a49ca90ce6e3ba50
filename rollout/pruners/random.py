"""A uniform draw of tokens: the control that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from foveate.kernels.sampling.philox import MASK, philox4x32
from foveate.rollout.pruners.protocol import EncodedImage, Kept
from foveate.rollout.pruning import PruneConfig


class RandomPruner:
    """Keeps the k tokens with the largest words, ties to the lowest index.

    The word of token i is c0 of Philox4x32-10(counter = (i, h0, h1, h2), key = seed mod 2^64); h0, h1, h2 are the first
    three 32-bit words, least byte first, of the image's content hash. So a draw depends on the image and on
    `PruneConfig.seed` alone: samples, groups and steps that see the same image keep the same tokens.
    """

    site: ClassVar[Literal["encoder"]] = "encoder"
    needs_attention: ClassVar[bool] = False

    def __init__(self, config: PruneConfig) -> None:
        seed = config.options["seed"]
        self.key = seed & MASK, (seed >> 32) & MASK

    def select(self, images: Sequence[EncodedImage], counts: Sequence[int], backend: str | None = None) -> list[Kept]:
        del backend
        return [self._select(image, count) for image, count in zip(images, counts, strict=True)]

    def _select(self, image: EncodedImage, count: int) -> Kept:
        h0, h1, h2 = (int.from_bytes(image.content_hash[at : at + 4], "little") for at in (0, 4, 8))
        tokens = torch.arange(len(image.features), device="cpu")
        c1, c2, c3, k0, k1 = (torch.full_like(tokens, word) for word in (h0, h1, h2, *self.key))
        words = philox4x32((tokens, c1, c2, c3), (k0, k1))[0]
        best = words.sort(descending=True, stable=True).indices[:count]
        return Kept(best.sort().values.int())
