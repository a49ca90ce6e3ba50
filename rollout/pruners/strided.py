"""Evenly spaced tokens in raster order: the control that needs no random number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from foveate.rollout.pruners.protocol import EncodedImage, Kept
from foveate.rollout.pruning import PruneConfig


class StridedPruner:
    """Keeps tokens floor((2 i + 1) N / (2 k)), i = 0 .. k - 1: the middle of each of k equal stretches."""

    site: ClassVar[Literal["encoder"]] = "encoder"
    needs_attention: ClassVar[bool] = False

    def __init__(self, config: PruneConfig) -> None:
        del config  # it has no options

    def select(self, images: Sequence[EncodedImage], counts: Sequence[int], backend: str | None = None) -> list[Kept]:
        del backend
        sizes = [len(image.features) for image in images]
        return [Kept(_spread(size, count)) for size, count in zip(sizes, counts, strict=True)]


def _spread(size: int, count: int) -> torch.Tensor:
    places = torch.arange(count, device="cpu")
    return ((2 * places + 1) * size // (2 * count)).int()
