"""DivPrune (Alvar et al., arXiv 2503.02175): tokens that are far from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from foveate.kernels.vision_prune import select_maxmin
from foveate.rollout.pruners.protocol import EncodedImage, Kept, offsets_of, split_selection
from foveate.rollout.pruning import PruneConfig


class DivPrune:
    """Greedy max-min cosine distance between the projected features, in float32; it looks at no score and no text."""

    site: ClassVar[Literal["encoder"]] = "encoder"
    needs_attention: ClassVar[bool] = False

    def __init__(self, config: PruneConfig) -> None:
        del config  # it has no options

    def select(self, images: Sequence[EncodedImage], counts: Sequence[int], backend: str | None = None) -> list[Kept]:
        offsets = offsets_of(len(image.features) for image in images)
        wanted = torch.tensor(list(counts), dtype=torch.int32, device="cpu")
        chosen = select_maxmin(torch.cat([image.features for image in images]), offsets, wanted, backend=backend)
        return [Kept(indices) for indices in split_selection(*chosen)]
