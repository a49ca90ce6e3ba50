"""What a pruner is: at which of two sites it works, what it is given and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, Protocol

import torch

from foveate.rollout.pruning import PruneConfig


@dataclass(frozen=True, eq=False)
class Merge:
    """What kept tokens absorb: each becomes the weighted sum of its sources, or stays as it is where it has none.

    offsets: int32 [k + 1]. source: int32, image-local tokens, itself included where it counts. weight: float32.
    """

    offsets: torch.Tensor
    source: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of one image. CPU tensors.

    indices: int32 [k], ascending, image-local in raster order of merged tokens. merge: None where nothing is merged.
    version: of the tower that the selection was made with; None for one that was given.
    """

    indices: torch.Tensor
    merge: Merge | None = None
    version: int | None = None


@dataclass(frozen=True, eq=False)
class TowerAttention:
    """What the tower's last full-attention block says about an image's N merged tokens, in raster order.

    scores: float32 [N], mean attention that a token's patches receive, over queries of their frame, heads, and the
    patches of the token. keys: float32 [N, head_dim], mean key over heads and the patches of the token,
    before rotation.
    """

    scores: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image as an encoder pruner sees it.

    content_hash: 16 bytes, of patches and grid. features: float [N, hidden], what takes the placeholders' place.
    attention: for pruners that ask for it, else None.
    """

    content_hash: bytes
    features: torch.Tensor
    attention: TowerAttention | None = None


class EncoderPruner(Protocol):
    """Selects between the vision tower and the language model; each image for itself, whoever comes with it."""

    site: ClassVar[Literal["encoder"]]
    needs_attention: ClassVar[bool]

    def __init__(self, config: PruneConfig) -> None: ...

    def select(self, images: Sequence[EncodedImage], counts: Sequence[int], backend: str | None = None) -> list[Kept]:
        """counts: tokens to keep of each image, 1 <= k < N. backend: of `foveate.kernels.vision_prune`.

        Deterministic: the same image, the same answer.
        """
        ...


@dataclass(frozen=True)
class Stage:
    """One place in the decoder at which image tokens are dropped.

    layer: the first decoder layer (>= 1) that no longer sees them. keep: share of an image's tokens, as they entered
    layer 0, that are left from there on; an image of N keeps `foveate.kernels.vision_prune.keep_count(N, keep)`.
    scores: mean over heads of the softmax attention of the prompt's last token to each image token; "before": in
    layer - 1, whose attention has just run; "within": in the layer itself, from its q and k of the tokens that are
    still there, which are dropped before its attention runs.
    """

    layer: int
    keep: float
    scores: Literal["before", "within"]


class LayerPruner(Protocol):
    """Drops inside the language model; ties in the scores go to the lowest index."""

    site: ClassVar[Literal["layer"]]

    def __init__(self, config: PruneConfig) -> None: ...

    def stages(self, num_layers: int) -> tuple[Stage, ...]:
        """By ascending layer, keep not ascending. Raises ValueError for a layer that a decoder of num_layers lacks."""
        ...


def offsets_of(sizes: Iterable[int]) -> torch.Tensor:
    """int32 [len(sizes) + 1] on the CPU: where each of several stretches begins, and the end of the last."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device="cpu")


def split_selection(indices: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """int32 [k] on the CPU for each image, from the indices of all."""
    return [part.clone() for part in indices.cpu().split(offsets.diff().tolist())]
