"""VisionZip (Yang et al., arXiv 2412.04467): tokens that the tower attends to, and others that absorb the rest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch

from foveate.kernels.vision_prune import Selection, merge_similar, select_topk
from foveate.rollout.pruners.protocol import EncodedImage, Kept, Merge, offsets_of, split_selection
from foveate.rollout.pruning import PruneConfig


class VisionZip:
    """Dominant tokens by attention, contextual tokens that the others are merged into. Qwen port.

    Qwen's towers have no class token: the score is the mean attention that a token's patches receive in the tower's
    last full-attention block (`TowerAttention.scores`). Of the k tokens floor(dominant * k + 1/2) are dominant; of the
    M others every max(1, M // (k - dominant))-th is contextual, and the rest is merged into the contextual token with
    the most similar key (`TowerAttention.keys`, without rotation): it becomes itself plus the mean of what it absorbs,
    as in the authors' code. They merge the tower's tokens, the port its projected ones and each deepstack level.
    """

    site: ClassVar[Literal["encoder"]] = "encoder"
    needs_attention: ClassVar[bool] = True

    def __init__(self, config: PruneConfig) -> None:
        self.dominant = config.options["dominant"]

    def select(self, images: Sequence[EncodedImage], counts: Sequence[int], backend: str | None = None) -> list[Kept]:
        attention = [image.attention for image in images if image.attention is not None]
        assert len(attention) == len(images), "the tower was asked for its attention"
        offsets = offsets_of(len(each.scores) for each in attention)
        dominant = [int(self.dominant * count + 0.5) for count in counts]
        others = [count - first for count, first in zip(counts, dominant, strict=True)]
        best = select_topk(torch.cat([each.scores for each in attention]), offsets, _counts(dominant), backend=backend)
        keys = torch.cat([each.keys for each in attention])
        best = Selection(best.indices, offsets_of(dominant))  # on the host, where it is known: nothing waits for a GPU
        merged = merge_similar(keys, offsets, best, _counts(others), backend=backend)
        kept = split_selection(merged.indices, merged.offsets)
        return [Kept(indices, merge) for indices, merge in zip(kept, _merges(*merged), strict=True)]


def _counts(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32, device="cpu")


def _merges(
    indices: torch.Tensor, offsets: torch.Tensor, starts: torch.Tensor, sources: torch.Tensor, weights: torch.Tensor
) -> list[Merge | None]:
    """The merge of each image; None where nothing was left to merge."""
    starts, sources, weights, bounds = starts.cpu(), sources.cpu(), weights.cpu(), offsets.tolist()
    merges: list[Merge | None] = []
    for first, last in pairwise(bounds):
        own = starts[first : last + 1]
        inside = slice(int(own[0]), int(own[-1]))
        some = inside.start < inside.stop
        merges.append(Merge(own - own[0], sources[inside], weights[inside]) if some else None)
    return merges
