"""Prompts with pruned images: what of them enters the language model, and the plan that says so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from foveate.kernels.vision_prune import keep_count
from foveate.rollout.checks import require
from foveate.rollout.processor import ImageInput, Prompt
from foveate.rollout.pruners.protocol import Kept, Merge, offsets_of
from foveate.rollout.pruning import PruneConfig
from foveate.rollout.types import KeepPlan, SiteKeep

UNKNOWN = -1  # position of an image token before its image was encoded


@dataclass(eq=False)
class Pruning:
    """What becomes of a prompt's image tokens; filled while its request runs.

    config_hash, method: of the configuration, or of the plan that is replayed. full: the prompt as a trainer's
    processor makes it. config: None for a plan. kept: what is kept of each image before the language model, by content
    hash. layer_sites: what sites inside it have kept, by ascending layer. versions: of the weights (language, vision)
    that the last of its tokens were selected with.
    """

    config_hash: str
    method: str
    full: Prompt
    config: PruneConfig | None = None
    kept: dict[bytes, Kept] = field(default_factory=dict)
    layer_sites: tuple[SiteKeep, ...] = ()
    versions: tuple[int, int] | None = None

    def key(self, image: ImageInput, vision_version: int) -> bytes:
        """What tells this selection of the image from others, for the identity of segments."""
        kept = self.kept.get(image.content_hash)
        version = vision_version if kept is None else kept.version
        digest = hashlib.blake2b(f"{self.config_hash} {version}".encode(), digest_size=16)
        if kept is not None and kept.version is None:
            merge = kept.merge
            for tensor in (kept.indices, *((merge.offsets, merge.source, merge.weight) if merge else ())):
                digest.update(tensor.contiguous().numpy().data)
        return digest.digest()

    def note(self, versions: tuple[int, int] | None) -> None:
        """Weights that part of the selection was made with; the plan says the latest."""
        if versions is not None:
            self.versions = max(self.versions or versions, versions)


def begin(prompt: Prompt, versions: tuple[int, int]) -> None:
    """Before tokens of the prompt are computed: what is not selected yet may be by these weights."""
    pruning = prompt.pruning
    if pruning is None or pruning.config is None:
        return
    if pruning.config.site == "layer":
        is_selected = bool(pruning.layer_sites)
    else:
        is_selected = all(image.content_hash in pruning.kept for image in prompt.images)
    if pruning.versions is None or not is_selected:
        pruning.note(versions)


def pruned(full: Prompt, config: PruneConfig) -> Prompt:
    """The prompt under a configuration: fewer image tokens, whose positions are UNKNOWN until `record`.

    Numbers of tokens depend on the images' sizes alone. Inside the language model nothing is dropped yet.
    """
    pruning = Pruning(config.config_hash, config.method, full, config)
    if config.site == "layer":
        return replace(full, pruning=pruning)
    return _shortened(full, [keep_count(image.num_tokens, config.keep) for image in full.images], pruning)


def record(prompt: Prompt, image: ImageInput, kept: Kept) -> None:
    """Notes what is kept of an image and gives its tokens in the prompt, wherever it stands, their positions."""
    assert prompt.pruning is not None, image.start
    prompt.pruning.kept[image.content_hash] = kept
    indices = kept.indices.long()
    for own, source in zip(prompt.images, prompt.pruning.full.images, strict=True):
        if own.content_hash == image.content_hash:
            rows = slice(own.start, own.start + own.num_tokens)
            prompt.positions[:, rows] = prompt.pruning.full.positions[:, source.start + indices]


def adopt(prompt: Prompt, source: Prompt, span: tuple[int, int]) -> None:
    """Takes over what was kept of the images in a segment that two prompts share.

    span: of the segment, in either prompt. Images elsewhere may be pruned otherwise: only a segment's identity says
    that the configuration and the tower are the same.
    """
    if prompt.pruning is None or source.pruning is None or prompt is source:
        return
    for image in prompt.images:
        kept = source.pruning.kept.get(image.content_hash)
        inside = span[0] <= image.start < span[1]
        if inside and kept is not None and image.content_hash not in prompt.pruning.kept:
            record(prompt, image, kept)
            prompt.pruning.note(source.pruning.versions)


def plan_of(prompt: Prompt) -> KeepPlan | None:
    """What a trainer replays; None without pruning, and for a prompt that was not computed to its end."""
    pruning = prompt.pruning
    if pruning is None or pruning.versions is None:
        return None
    sites = pruning.layer_sites
    if pruning.config is not None and pruning.config.site == "encoder":
        if any(image.content_hash not in pruning.kept for image in prompt.images):
            return None
        sites = (_encoder_site(pruning),)
    elif not sites and prompt.images:
        return None
    selected = [kept.version for kept in pruning.kept.values() if kept.version is not None]
    return KeepPlan(
        config_hash=pruning.config_hash,
        method=pruning.method,
        sites=sites,
        positions=prompt.positions.to(torch.int32).contiguous(),
        next_position=prompt.next_position,
        language_version=pruning.versions[0],
        vision_version=max(selected, default=pruning.versions[1]),
    )


def replayed(full: Prompt, plan: KeepPlan) -> Prompt:
    """The prompt as it was when the plan was made. Raises ValueError for a plan that does not fit the prompt."""
    encoder = [site for site in plan.sites if site.kind == "encoder"]
    layers = tuple(site for site in plan.sites if site.kind == "layer")
    known = len(encoder) <= 1 and len(encoder) + len(layers) == len(plan.sites)
    require(known, "at most one encoder site, and layer sites", [site.kind for site in plan.sites], "keep.sites")
    for site in plan.sites:
        check_site(site, [image.num_tokens for image in full.images])
    pruning = Pruning(plan.config_hash, plan.method, full, layer_sites=layers)
    pruning.versions = plan.language_version, plan.vision_version
    prompt = replace(full, pruning=pruning)
    if encoder:
        kept = kept_by_image(encoder[0])
        prompt = _shortened(full, [len(each.indices) for each in kept], pruning)
        for image, each in zip(prompt.images, kept, strict=True):
            twin = pruning.kept.get(image.content_hash)
            same = twin is None or torch.equal(twin.indices, each.indices)
            require(same, "equal images to keep equal tokens", "others", "keep.sites")
            record(prompt, image, each)
    same = plan.positions.shape == prompt.positions.shape and torch.equal(plan.positions.long(), prompt.positions)
    require(same, "the positions of the prompt's kept tokens", "others", "keep.positions")
    require(plan.next_position == full.next_position, f"{full.next_position}", plan.next_position, "keep.next_position")
    return prompt


def _shortened(full: Prompt, counts: list[int], pruning: Pruning) -> Prompt:
    """counts: image tokens that are left, by image."""
    alive = torch.ones(len(full.token_ids), dtype=torch.bool, device="cpu")
    for image, count in zip(full.images, counts, strict=True):
        alive[image.start + count : image.start + image.num_tokens] = False
    places = [0, *alive.cumsum(0).tolist()]  # of each token, and of the end, in the shorter prompt
    positions = full.positions[:, alive].contiguous()
    images = []
    for image, count in zip(full.images, counts, strict=True):
        start = places[image.start]
        positions[:, start : start + count] = UNKNOWN
        images.append(replace(image, start=start, num_tokens=count))
    boundaries = tuple(places[end] for end in full.boundaries)
    token_ids = full.token_ids[alive]
    return Prompt(token_ids, positions, full.next_position, tuple(images), boundaries, pruning)


def _encoder_site(pruning: Pruning) -> SiteKeep:
    images = pruning.full.images
    kept = [pruning.kept[image.content_hash] for image in images]
    return SiteKeep(
        kind="encoder",
        layer=0,
        num_tokens=torch.tensor([image.num_tokens for image in images], dtype=torch.int32, device="cpu"),
        kept=torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *(each.indices for each in kept)]),
        kept_offsets=offsets_of([len(each.indices) for each in kept]),
        **_merge_fields(kept),
    )


def _merge_fields(kept: list[Kept]) -> dict[str, torch.Tensor]:
    """merge_offsets, merge_source, merge_weight of a site; empty where no image merges."""
    if all(each.merge is None for each in kept):
        return {}
    counts, sources, weights = [], [], []
    for each in kept:
        if each.merge is None:
            counts += [0] * len(each.indices)
        else:
            counts += each.merge.offsets.diff().tolist()
            sources.append(each.merge.source)
            weights.append(each.merge.weight)
    return {"merge_offsets": offsets_of(counts), "merge_source": torch.cat(sources), "merge_weight": torch.cat(weights)}


def kept_by_image(site: SiteKeep) -> list[Kept]:
    """A site's tokens and merges, taken apart."""
    bounds = site.kept_offsets.tolist()
    kept = []
    for start, stop in pairwise(bounds):
        merge = None
        if site.merge_offsets is not None and site.merge_source is not None and site.merge_weight is not None:
            offsets = site.merge_offsets[start : stop + 1]
            inside = slice(int(offsets[0]), int(offsets[-1]))
            if inside.start < inside.stop:
                merge = Merge(offsets - offsets[0], site.merge_source[inside], site.merge_weight[inside])
        kept.append(Kept(site.kept[start:stop], merge))
    return kept


def check_site(site: SiteKeep, sizes: list[int]) -> None:
    """Raises ValueError for a site that is not one of images of `sizes` tokens."""
    bounds = site.kept_offsets.tolist()
    require(site.num_tokens.tolist() == sizes, f"images of {sizes} tokens", site.num_tokens.tolist(), "keep.num_tokens")
    ordered = len(bounds) == len(sizes) + 1 and bounds[0] == 0 and bounds[-1] == len(site.kept)
    require(ordered, f"{len(sizes) + 1} offsets of {len(site.kept)} kept tokens", bounds, "keep.kept_offsets")
    for size, start, stop in zip(sizes, bounds[:-1], bounds[1:], strict=True):
        kept = site.kept[start:stop].tolist()
        ascending = all(a < b for a, b in zip([-1, *kept], [*kept, size], strict=True))
        some = len(kept) > 0 or (site.kind == "layer" and start == stop)
        require(some and ascending, f"ascending tokens in [0, {size})", kept, "keep.kept")
    _check_merges(site, sizes)


def _check_merges(site: SiteKeep, sizes: list[int]) -> None:
    """Raises ValueError for merges that are not ones of the site's kept tokens, whose offsets fit."""
    fields = site.merge_offsets, site.merge_source, site.merge_weight
    given = [field is not None for field in fields]
    require(all(given) or not any(given), "all three fields of merges, or none", given, "keep.merge_offsets")
    if site.merge_offsets is None or site.merge_source is None or site.merge_weight is None:
        return
    require(site.kind == "encoder", "merged tokens at the encoder alone", site.kind, "keep.merge_offsets")
    offsets, source, count = site.merge_offsets.tolist(), site.merge_source.tolist(), len(site.kept)
    weights = len(site.merge_weight)
    require(weights == len(source), f"{len(source)} weights", weights, "keep.merge_weight")
    whole = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == len(source)
    ascending = all(a <= b for a, b in pairwise(offsets))
    expected = f"{count + 1} offsets that ascend from 0 to {len(source)}"
    require(whole and ascending, expected, offsets, "keep.merge_offsets")
    for size, (start, stop) in zip(sizes, pairwise(site.kept_offsets.tolist()), strict=True):
        beyond = [token for token in source[offsets[start] : offsets[stop]] if not 0 <= token < size]
        require(not beyond, f"tokens in [0, {size})", beyond[:3], "keep.merge_source")
