"""Pruned groups made by hand, with plans of every kind, and a trainer's forward over them in each way of replaying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from foveate.rollout import models
from foveate.rollout.config import SamplingParams
from foveate.rollout.policy import policy_logprobs
from foveate.rollout.prefix_groups import Sample
from foveate.rollout.replay import replay
from foveate.rollout.testing import special_id, tiny_model
from foveate.rollout.types import KeepPlan, Request, Rollout, RolloutGroup, SiteKeep, VisionInputs

GRIDS: list[list[list[int]]] = [[[1, 4, 6], [1, 8, 4]], [[1, 6, 6]], [], [[1, 2, 2], [1, 4, 4]]]
NUM_LAYERS = 4

SiteMaker = Callable[[list[int], torch.Generator], SiteKeep]  # from the numbers of tokens of a prompt's images
Merges = list[list[tuple[int, float]]]  # by kept token, its sources and their weights


def model_of(family: str, attention: str = "sdpa") -> nn.Module:
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS)
    model.set_attn_implementation(attention)  # type: ignore[operator]
    return model


def site(
    kind: Literal["patch", "encoder", "layer"],
    layer: int,
    sizes: list[int],
    kept: list[list[int]],
    merges: Merges | None = None,
) -> SiteKeep:
    """sizes: tokens of each image. kept: of each image."""
    merge: dict[str, torch.Tensor] = {}
    if merges is not None:
        merge = {
            "merge_offsets": _offsets([len(own) for own in merges]),
            "merge_source": _ints([source for own in merges for source, _ in own]),
            "merge_weight": torch.tensor([weight for own in merges for _, weight in own]),
        }
    tokens = [token for own in kept for token in own]
    return SiteKeep(kind, layer, _ints(sizes), _ints(tokens), _offsets([len(own) for own in kept]), **merge)


def drawn(
    kind: Literal["encoder", "layer"], layer: int, share: float, seed: int = 0, within: SiteMaker | None = None
) -> SiteMaker:
    """Keeps a random share of each image's tokens, at least one, of those that the site `within` keeps."""

    def make(sizes: list[int], generator: torch.Generator) -> SiteKeep:
        own = torch.Generator().manual_seed(seed)
        left = [list(range(size)) for size in sizes] if within is None else kept_of(within(sizes, generator))
        kept = []
        for tokens in left:
            order = torch.randperm(len(tokens), generator=own).tolist()
            kept.append(sorted(tokens[index] for index in order[: max(1, int(share * len(tokens)))]))
        return site(kind, layer, sizes, kept)

    return make


def merged(sizes: list[int], generator: torch.Generator) -> SiteKeep:
    """Keeps every third token and merges the one before and behind, where there are; the first stays as it is."""
    kept = [list(range(0, size, 3)) for size in sizes]
    merges: Merges = []
    for size, own in zip(sizes, kept, strict=True):
        for token in own:
            near = [(source, 0.5) for source in (token - 1, token + 1) if 0 <= source < size]
            merges.append([(token, 0.75), *near] if token else [])
    return site("encoder", 0, sizes, kept, merges)


def emptied(layer: int) -> SiteMaker:
    """Keeps nothing from a layer on."""
    return lambda sizes, generator: site("layer", layer, sizes, [[] for _ in sizes])


def hand_made(
    model: nn.Module,
    grids: list[list[int]],
    lengths: Sequence[int],
    seed: int,
    sites: Sequence[SiteMaker] = (),
    dtype: torch.dtype = torch.float32,
    text_after: bool = True,
) -> RolloutGroup:
    """A group of random tokens and patches, pruned by `sites`, which are nested; named r<seed>.

    grids: of its images. lengths: of its completions. text_after: else the prompt ends with the last image token.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = models.describe(model).vision
    assert vision is not None, type(model)
    ids = _prompt(grids, torch.randint(256, (3 + seed,), generator=generator).tolist())
    prompt, grid = torch.tensor(ids if text_after else ids[:-2]), torch.tensor(grids).reshape(-1, 3)
    positions, follows = vision.positions(prompt, grid)
    tokens = [torch.randint(256, (length,), generator=generator) for length in lengths]
    zeros = [torch.zeros(length) for length in lengths]
    patches = torch.randn(int(grid.prod(-1).sum()), vision.patch_dim, generator=generator, dtype=dtype)
    made = tuple(make((grid.prod(-1) // 4).tolist(), generator) for make in sites)
    entering = torch.ones(len(prompt), dtype=torch.bool)
    if made and made[0].kind == "encoder":
        entering[image_rows(prompt, made[0], kept=False)] = False
    return RolloutGroup(
        request=Request(prompt, n=len(lengths)),
        request_id=f"r{seed}",
        prompt_ids=prompt,
        prompt_positions=positions.int(),
        next_position=follows,
        segments=torch.tensor([len(prompt)], dtype=torch.int32),
        rollouts=tuple(Rollout(t, z, z, z, "length") for t, z in zip(tokens, zeros, strict=True)),
        image_grid_thw=grid if grids else None,
        pixel_values=patches if grids else None,
        keep=KeepPlan("", "hand", made, positions[:, entering].int(), follows, 0, 0) if made else None,
    )


def images_request(grids: list[list[int]], seed: int = 0, **sampling: Any) -> Request:
    """A request of random patches, of any size, which an image processor would not make. grids: of its images."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor(grids)
    patches = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=generator)
    params = SamplingParams(**{"max_tokens": 6, "seed": seed, "ignore_eos": True, **sampling})
    return Request(torch.tensor(_prompt(grids, [72, 105])), vision=VisionInputs(patches, grid), sampling=params)


def mixed_groups(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[RolloutGroup]:
    """Sites of both kinds and both together, merges, images of which nothing is left, no plan, no image."""
    plans: list[list[SiteMaker]] = [
        [merged],
        [drawn("layer", 1, 0.5), emptied(3)],
        [],
        [drawn("encoder", 0, 0.6), drawn("layer", 2, 0.5, within=drawn("encoder", 0, 0.6))],
    ]
    lengths = [(5, 1, 9), (4, 4), (2, 7), (6,)]
    cases = zip(GRIDS, lengths, plans, strict=True)
    groups = [hand_made(model, grids, own, seed, sites, dtype) for seed, (grids, own, sites) in enumerate(cases)]
    return [*groups, hand_made(model, GRIDS[0], (3,), len(groups), (), dtype)]


def samples_of(groups: Sequence[RolloutGroup]) -> list[Sample]:
    return [Sample(group, rollout) for group in groups for rollout in group.rollouts]


def kept_of(part: SiteKeep) -> list[list[int]]:
    """Of each image, in its own numbers."""
    return [own.tolist() for own in part.kept.split(part.kept_offsets.diff().tolist())]


def image_rows(prompt: torch.Tensor, part: SiteKeep, kept: bool) -> list[int]:
    """Rows of the prompt's image tokens that a site keeps, or that it does not."""
    places = (prompt == special_id("<|image_pad|>")).nonzero().flatten().tolist()
    rows, first = [], 0
    for size, own in zip(part.num_tokens.tolist(), kept_of(part), strict=True):
        rows += [places[first + token] for token in range(size) if (token in own) == kept]
        first += size
    return rows


def batch_of(samples: Sequence[Sample], side: str = "right") -> dict[str, Any]:
    """What a trainer hands to the model: padded rows of prompt and completion, and all images."""
    rows = [torch.cat([sample.group.prompt_ids, sample.rollout.token_ids]) for sample in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    batch = {"input_ids": ids, "attention_mask": mask}
    seen = [(sample.group.pixel_values, sample.group.image_grid_thw) for sample in samples]
    pixels = [pixels for pixels, _ in seen if pixels is not None]
    grids = [grids for _, grids in seen if grids is not None]
    return {**batch, "pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if pixels else batch


def completions(logits: torch.Tensor, samples: Sequence[Sample], side: str = "right") -> torch.Tensor:
    """[N], log-probs of the completions' tokens, from a padded batch's logits."""
    logprobs = []
    for row, sample in zip(logits, samples, strict=True):
        tokens, prompt = sample.rollout.token_ids, len(sample.group.prompt_ids)
        start = len(row) - prompt - len(tokens) if side == "left" else 0
        own = row[start + prompt - 1 : start + prompt + len(tokens) - 1]
        temperature = sample.group.request.sampling.temperature or 1.0
        logprobs.append((own / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    return torch.cat(logprobs)


def by_context(model: nn.Module, samples: Sequence[Sample], side: str = "right") -> torch.Tensor:
    """[N], log-probs by `replay` around the model's own forward."""
    groups = list({id(sample.group): sample.group for sample in samples}.values())
    with replay(model, groups):
        return completions(model(**batch_of(samples, side)).logits, samples, side)


def by_policy(model: nn.Module, samples: Sequence[Sample], prefix_grouping: bool = False) -> torch.Tensor:
    """[N], log-probs by the GRPO loop's forward."""
    return policy_logprobs(models.describe(model), samples, prefix_grouping=prefix_grouping).logprobs


USERS: dict[str, Callable[[nn.Module, Sequence[Sample]], torch.Tensor]] = {
    "rows": by_policy,
    "shared rows": lambda model, samples: by_policy(model, samples, True),
    "right": by_context,
    "left": lambda model, samples: by_context(model, samples, "left"),
}


def _prompt(grids: list[list[int]], ids: list[int]) -> list[int]:
    """ids, then each image between its start and end tokens, a token of text behind it."""
    for _, height, width in grids:
        ids = [*ids, special_id("<|vision_start|>"), *[special_id("<|image_pad|>")] * (height * width // 4)]
        ids += [special_id("<|vision_end|>"), 65]
    return ids


def _ints(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
