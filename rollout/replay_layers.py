"""Layers that compute only the tokens they still see, inside a transformers decoder that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from foveate.rollout.checks import require
from foveate.rollout.models import ModelSpec
from foveate.rollout.prefix_groups import PADDING, attention_kind, attention_mask, score_dtype
from foveate.rollout.replay_plan import PromptView


@dataclass(frozen=True, eq=False)
class Stage:
    """What decoder layers from `layer` on compute of R rows of L tokens.

    columns: int64 [R, L'], distinct in a row; first the tokens that are seen, ascending, then any others. segments:
    int64 [R, L'], of those that are seen, PADDING on the others.
    """

    layer: int
    columns: torch.Tensor
    segments: torch.Tensor


def keep_columns(seen: torch.Tensor) -> torch.Tensor:
    """int64 [R, L'] of bool [R, L]: the columns that are seen, ascending, and others up to the longest row's number."""
    order = (~seen).int().sort(dim=1, stable=True).indices
    return order[:, : int(seen.sum(1).max())]


def make_stages(
    segments: torch.Tensor, views: Sequence[PromptView], device: torch.device | str = "cpu"
) -> tuple[Stage, ...]:
    """The stages of a batch, one for each layer at which any of its rows loses tokens.

    segments: int64 [R, L], on the CPU, PADDING where there is no token; each row begins with its prompt's P' tokens.
    views: of each row.
    """
    stages = []
    for layer in sorted({layer for view in views for layer, _ in view.seen_from}):
        seen = segments != PADDING
        for row, view in zip(seen, views, strict=True):
            row[: len(view.rows)] &= view.visible_keys(layer)
        columns = keep_columns(seen)
        own = segments.masked_fill(~seen, PADDING).gather(1, columns)
        stages.append(Stage(layer, columns.to(device), own.to(device)))
    return tuple(stages)


@contextmanager
def staged(spec: ModelSpec, stages: Sequence[Stage]) -> Iterator[None]:
    """Within it a forward of `spec.decoder` runs layers from each stage on over the stage's tokens alone.

    Rows of tokens that a layer does not see go past it unchanged. What a layer is called with is changed outside of
    it, so that a checkpointed layer recomputes the same whenever its backward runs. Without a stage nothing is touched.
    Raises ValueError for a layer that the decoder lacks, and for an attention without a backend here.
    """
    if not stages:
        yield
        return
    layers, last = spec.decoder.layers, stages[-1].layer
    require(last < len(layers), f"a layer from 1 to {len(layers) - 1}", last, "keep.sites")
    check_backend(spec)
    runs = {stage.layer: _StageRun(spec, stage) for stage in stages}
    views: list[Callable[..., Any]] = []
    run: _StageRun | None = None
    for index, layer in enumerate(layers):
        run = runs.get(index, run)
        views.append(layer if run is None else partial(run, layer))
    # In the instance's own dictionary it shadows the registered modules and leaves them where they are.
    spec.decoder.__dict__["layers"] = views
    try:
        yield
    finally:
        del spec.decoder.__dict__["layers"]


def check_backend(spec: ModelSpec) -> None:
    """ValueError naming an attention under which dropped tokens cannot be replayed inside the decoder."""
    kind = attention_kind(spec)
    known = kind in ("eager", "sdpa", "flex_attention") or "flash" in kind
    require(known, "eager, sdpa, flex_attention or a flash attention to drop tokens", kind, "attn_implementation")


class _StageRun:
    """The layers of one stage in one forward; mask and rotary embeddings are made at the first of them."""

    def __init__(self, spec: ModelSpec, stage: Stage):
        self.spec, self.stage = spec, stage
        self.changed: dict[str, Any] = {}

    def __call__(self, layer: Callable[..., torch.Tensor], hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        columns = self.stage.columns.to(hidden.device)
        if not self.changed:
            rotary = tuple(take(plane, columns) for plane in kwargs["position_embeddings"])
            self.changed = {"attention_mask": self._mask(hidden), "position_embeddings": rotary}
        out = layer(take(hidden, columns), **{**kwargs, **self.changed})
        return hidden.scatter(1, columns[..., None].expand_as(out), out)

    def _mask(self, hidden: torch.Tensor) -> Any:
        segments = self.stage.segments.to(hidden.device)
        if "flash" in attention_kind(self.spec):
            return (segments != PADDING).long()
        return attention_mask(self.spec, segments, score_dtype(hidden))


def take(planes: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[..., R, L', D] of [..., R or 1, L, D], columns int64 [R, L']."""
    rows, length = columns.shape
    planes = planes.expand(*planes.shape[:-3], rows, *planes.shape[-2:])
    index = columns[..., None].expand(*planes.shape[:-3], rows, length, planes.shape[-1])
    return planes.gather(-2, index)
