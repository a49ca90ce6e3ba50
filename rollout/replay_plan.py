"""What a recorded plan leaves of a prompt: the tokens that enter the decoder, and those that each layer still sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from foveate.rollout.checks import require
from foveate.rollout.models.spec import VisionSpec
from foveate.rollout.pruned import check_site, kept_by_image
from foveate.rollout.pruners.protocol import Kept
from foveate.rollout.selection import kept_features
from foveate.rollout.types import KeepPlan, RolloutGroup, SiteKeep


@dataclass(frozen=True, eq=False)
class PromptView:
    """The P' of a prompt's P tokens that enter layer 0. CPU tensors.

    rows: int64 [P'], ascending, in the prompt. positions: int64 [3, P'], those of the whole prompt. kept: of each image
    what enters layer 0, None for a prompt of which everything does. seen_from: by ascending layer, bool [P'], what that
    layer and those behind it see.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    kept: tuple[Kept, ...] | None = None
    seen_from: tuple[tuple[int, torch.Tensor], ...] = ()

    def visible_keys(self, layer: int) -> torch.Tensor:
        """bool [P'], tokens that are keys in a decoder layer."""
        seen = torch.ones(len(self.rows), dtype=torch.bool, device="cpu")
        for first, tokens in self.seen_from:
            seen = tokens if first <= layer else seen
        return seen

    def image_rows(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """float [K, levels, hidden], what stands for the image tokens that enter layer 0; merged, with gradients.

        features: of each image float [N, levels, hidden], every level treated alike.
        """
        if self.kept is None:
            return torch.cat(list(features))
        return torch.cat([kept_features(image, kept) for image, kept in zip(features, self.kept, strict=True)])


def num_entering(group: RolloutGroup) -> int:
    """Tokens of a group's prompt that enter layer 0."""
    return len(group.prompt_ids) if group.keep is None else group.keep.positions.shape[1]


def prompt_view(group: RolloutGroup, vision: VisionSpec | None) -> PromptView:
    """The group's prompt under its plan, all of it without one.

    Raises ValueError, naming the request, for a plan that is not this prompt's: other images, tokens out of order or
    range, a later layer that sees what an earlier one does not, other positions.
    """
    if group.keep is None:
        return PromptView(torch.arange(len(group.prompt_ids), device="cpu"), group.prompt_positions.long().cpu())
    try:
        require(vision is not None, "a model with a vision tower", None, "model")
        assert vision is not None, group.request_id
        return _view(group, group.keep, vision)
    except ValueError as error:
        raise ValueError(f"request {group.request_id!r}: {error}") from error


def _view(group: RolloutGroup, plan: KeepPlan, vision: VisionSpec) -> PromptView:
    grids = torch.empty(0, 3, dtype=torch.int64, device="cpu") if group.image_grid_thw is None else group.image_grid_thw
    sizes = (grids.prod(-1) // vision.merge_size**2).tolist()
    places = (group.prompt_ids.cpu() == vision.image_token_id).nonzero()[:, 0]
    require(len(places) == sum(sizes), f"{sum(sizes)} image tokens", len(places), "group.prompt_ids")
    _check_sites(plan.sites, sizes)
    alive = torch.ones(len(group.prompt_ids), dtype=torch.bool, device="cpu")
    kept: tuple[Kept, ...] | None = None
    later = []
    for site in plan.sites:
        seen = alive.clone()
        seen[places] = _tokens(site)
        require(not bool((seen & ~alive).any()), "sites that keep tokens of those before them", "others", "keep.sites")
        if site.kind == "encoder":
            kept = tuple(kept_by_image(site))
        else:
            later.append((site.layer, seen))
        alive = seen
    entering = torch.ones_like(alive)
    if kept is not None:
        entering[places] = _tokens(plan.sites[0])
    rows = entering.nonzero()[:, 0]
    positions = group.prompt_positions.long().cpu()[:, rows]
    same = plan.positions.shape == positions.shape and torch.equal(plan.positions.long(), positions)
    require(same, "the positions of the prompt's kept tokens", "others", "keep.positions")
    follows = group.next_position
    require(plan.next_position == follows, f"{follows}", plan.next_position, "keep.next_position")
    require(bool(alive[rows[-1:]].all()), "the last token of the prompt to be kept", "dropped", "keep.sites")
    return PromptView(rows, positions, kept, tuple((layer, seen[rows]) for layer, seen in later))


def _check_sites(sites: Sequence[SiteKeep], sizes: list[int]) -> None:
    kinds = [site.kind for site in sites]
    known = all(kind == "layer" or (kind == "encoder" and index == 0) for index, kind in enumerate(kinds))
    require(known, "an encoder site or none, then layer sites", kinds, "keep.sites")
    layers = [site.layer for site in sites if site.kind == "layer"]
    require(all(a < b for a, b in pairwise([0, *layers])), "ascending layers >= 1", layers, "keep.sites")
    merges = [site.layer for site in sites if site.kind == "layer" and site.merge_offsets is not None]
    require(not merges, "merged tokens at the encoder alone", merges, "keep.sites")
    for site in sites:
        check_site(site, sizes)


def _tokens(site: SiteKeep) -> torch.Tensor:
    """bool [image tokens], all images one after another: what the site keeps."""
    sizes, counts = site.num_tokens.long(), site.kept_offsets.diff().long()
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, counts)
    tokens = torch.zeros(int(sizes.sum()), dtype=torch.bool, device="cpu")
    tokens[first + site.kept] = True
    return tokens
