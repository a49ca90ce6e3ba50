"""Prompts that lose image tokens inside the language model: how many each layer group holds, and what waits for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from foveate.kernels.vision_prune import keep_count
from foveate.rollout.checks import require
from foveate.rollout.layer_groups import LayerGroups
from foveate.rollout.processor import ImageInput, Prompt
from foveate.rollout.types import SiteKeep


@dataclass(eq=False)
class Tail:
    """A prompt from the segment of its first image on, which waits for the prompt's last token to be pruned.

    The first layer group computes it in chunks, like any tokens; the others run on what is kept of all of it, in the
    step of its last chunk. counts: by layer group, tokens of each image that the group holds, known beforehand. held:
    float [n, 1 + levels, hidden], the residual stream behind the first group for tokens of earlier steps, with the
    deepstack levels that are still to be added. is_complete: the other groups have run. given: the plan that is
    replayed, None where the tokens are to be chosen.
    """

    prompt: Prompt
    counts: tuple[tuple[int, ...], ...]
    given: tuple[SiteKeep | None, ...] | None = None
    held: list[torch.Tensor] = field(default_factory=list)
    is_complete: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(rows.nbytes for rows in self.held)

    def tokens(self, span: tuple[int, int]) -> tuple[int, ...]:
        """Tokens of a segment of the prompt by layer group."""
        inside = [index for index, image in enumerate(self.prompt.images) if span[0] <= image.start < span[1]]
        full = self.counts[0]
        return tuple(span[1] - span[0] - sum(full[i] - counts[i] for i in inside) for counts in self.counts)

    def offset(self, index: int, span: tuple[int, int], group: int) -> int:
        """Where an image begins among the tokens of its segment that a layer group holds."""
        images, full, counts = self.prompt.images, self.counts[0], self.counts[group]
        before = [i for i in range(index) if span[0] <= images[i].start]
        return images[index].start - span[0] - sum(full[i] - counts[i] for i in before)

    def kept(self, group: int, index: int) -> np.ndarray:
        """int32, tokens of an image that the replayed plan keeps for a layer group, in the image's own numbers."""
        assert self.given is not None, "a plan to replay"
        site = next((site for site in self.given[:group][::-1] if site is not None), None)
        if site is None:
            return np.arange(self.counts[0][index], dtype=np.int32)
        return site.kept[site.kept_offsets[index] : site.kept_offsets[index + 1]].numpy()

    def hand_to(self, prompt: Prompt) -> None:
        """Notes what was kept for a prompt that shares this one, unless it has a plan."""
        if prompt.pruning and self.prompt.pruning and not prompt.pruning.layer_sites:
            prompt.pruning.layer_sites = self.prompt.pruning.layer_sites
            prompt.pruning.note(self.prompt.pruning.versions)


def is_pruned_inside(prompt: Prompt) -> bool:
    """Whether image tokens of the prompt are dropped between decoder layers."""
    pruning = prompt.pruning
    if pruning is None or not prompt.images:
        return False
    return bool(pruning.layer_sites) or (pruning.config is not None and pruning.config.site == "layer")


def tail_of(prompt: Prompt, groups: LayerGroups) -> Tail | None:
    """A new tail of the prompt, None if it is not pruned inside the language model.

    Of an image of N tokens a stage leaves max(1, floor(keep N + 1/2)), but no more than the stage before; the budget is
    an image's own, so that pages are counted exactly before anything is selected.
    """
    if not is_pruned_inside(prompt):
        return None
    assert prompt.pruning is not None, prompt
    full = tuple(image.num_tokens for image in prompt.images)
    counts = [full]
    if not prompt.pruning.layer_sites:
        for stage in groups.stages:
            wanted = [keep_count(size, stage.keep) for size in full]
            counts.append(tuple(min(a, b) for a, b in zip(counts[-1], wanted, strict=True)))
        return Tail(prompt, tuple(counts))
    by_layer = {site.layer: site for site in prompt.pruning.layer_sites}
    given = tuple(by_layer.get(stage.layer) for stage in groups.stages)
    for site in given:
        counts.append(counts[-1] if site is None else tuple(site.kept_offsets.diff().tolist()))
    return Tail(prompt, tuple(counts), given)


def check_plan(prompt: Prompt, groups: LayerGroups) -> None:
    """Raises ValueError for a recorded plan that these layer groups cannot replay."""
    if not is_pruned_inside(prompt) or prompt.pruning is None:
        return
    layers, starts = [site.layer for site in prompt.pruning.layer_sites], [stage.layer for stage in groups.stages]
    fits = set(layers) <= set(starts) and layers == sorted(set(layers))
    require(fits, f"a plan that drops tokens before layers {starts}, as EngineConfig.prune", layers, "keep.sites")
    images = prompt.pruning.full.images
    whole = [image.num_tokens for image in images] == [image.num_tokens for image in prompt.images]
    require(whole, "layer sites without an encoder site", "both", "keep.sites")
    for index in range(len(images)):
        before: set[int] | None = None
        for site in prompt.pruning.layer_sites:
            kept = set(site.kept[site.kept_offsets[index] : site.kept_offsets[index + 1]].tolist())
            require(before is None or kept <= before, "nested sites", "others", "keep.sites")
            before = kept
    ends = images[-1].start + images[-1].num_tokens == len(prompt.token_ids)
    last = images[-1].num_tokens - 1
    dropped = [site for site in prompt.pruning.layer_sites if last not in site.kept[site.kept_offsets[-2] :].tolist()]
    require(not (ends and dropped), "the last token of the prompt to be kept", "dropped", "keep.sites")


def fingerprint(prompt: Prompt) -> bytes:
    """What tells this prompt, its configuration and its plan from others: what its pruned tokens depend on.

    The boundaries too: a tail is one of certain segments.
    """
    assert prompt.pruning is not None, prompt
    digest = hashlib.blake2b(prompt.pruning.config_hash.encode(), digest_size=16)
    digest.update(prompt.token_ids.numpy().data)
    digest.update(prompt.positions.contiguous().numpy().data)
    digest.update(repr(prompt.boundaries).encode())
    for image in prompt.images:
        digest.update(image.content_hash)
    for site in prompt.pruning.layer_sites:
        digest.update(f"{site.layer} {site.kept_offsets.tolist()}".encode())
        digest.update(site.kept.contiguous().numpy().data)
    return digest.digest()


def sites_of(groups: LayerGroups, images: Sequence[ImageInput], kept: list[list[np.ndarray]]) -> tuple[SiteKeep, ...]:
    """The plan of a prompt. kept: by stage and image, tokens in the image's own numbers."""
    sizes = torch.tensor([image.num_tokens for image in images], dtype=torch.int32, device="cpu")
    sites = []
    for stage, parts in zip(groups.stages, kept, strict=True):
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        sites.append(SiteKeep("layer", stage.layer, sizes, tokens, torch.from_numpy(offsets)))
    return tuple(sites)
