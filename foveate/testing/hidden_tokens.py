"""Truth for pruning between decoder layers: transformers' module, eager, with dropped tokens hidden by masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from foveate.rollout.types import KeepPlan, Rollout, RolloutGroup

TOLERANCE = 1e-5  # of log-probs on tiny models
MARGIN = 1e-5  # relative, of scores at a cut: closer ones may be ordered otherwise
HIDDEN = torch.finfo(torch.float32).min
Cut = list[tuple[int, float, int]]  # (first layer without the dropped, share, layer whose attention scores)
Kept = list[list[list[int]]]  # by stage and image, tokens in the image's own numbers


def eager(model: Any) -> Any:
    """Attention that hands its weights out; the engine does not use the module's attention."""
    model.set_attn_implementation("eager")
    return model


def image_places(model: Any, group: RolloutGroup) -> list[list[int]]:
    """Prompt tokens of each image."""
    if group.image_grid_thw is None:
        return []
    places = torch.where(group.prompt_ids == model.config.image_token_id)[0].tolist()
    sizes = (group.image_grid_thw.prod(1) // 4).tolist()
    return [[places.pop(0) for _ in range(size)] for size in sizes]


class Dense:
    """One forward of the module over one sequence, in which layers do not see certain tokens of the prompt.

    hidden_from: layer -> prompt tokens that layers from this one on do not see. attention: by layer, float64 [heads,
    tokens, tokens]. logits: float32 [tokens, vocab].
    """

    def __init__(self, model: Any, group: RolloutGroup, completion: torch.Tensor, hidden_from: dict[int, list[int]]):
        self.hidden_from = hidden_from
        self.attention: dict[int, np.ndarray] = {}
        layers = model.model.language_model.layers
        hooks = [layer.register_forward_pre_hook(self.hide(i), with_kwargs=True) for i, layer in enumerate(layers)]
        hooks += [layer.self_attn.register_forward_hook(self.keep(i)) for i, layer in enumerate(layers)]
        ids = torch.cat([group.prompt_ids, completion])[None]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if group.pixel_values is not None:
            inputs |= {"pixel_values": group.pixel_values, "image_grid_thw": group.image_grid_thw}
            inputs["mm_token_type_ids"] = ids.eq(model.config.image_token_id).int()
        model.model.rope_deltas = None
        try:
            with torch.no_grad():
                self.logits = model(**inputs, use_cache=False).logits[0].float()
        finally:
            for hook in hooks:
                hook.remove()

    def hide(self, index: int) -> Callable:
        tokens = [token for layer, part in self.hidden_from.items() if layer <= index for token in part]

        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            mask[..., tokens] = HIDDEN
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def keep(self, index: int) -> Callable:
        def hook(module, args, output):
            self.attention[index] = output[1][0].double().numpy()

        return hook


def oracle_kept(model: Any, group: RolloutGroup, cut: Cut) -> tuple[Kept, float]:
    """What the dense attention matrices say is kept, and the smallest relative margin at a cut."""
    places, prompt, margin = image_places(model, group), group.prompt_ids[:0], np.inf
    kept: Kept = []
    hidden_from: dict[int, list[int]] = {}
    left = [list(range(len(place))) for place in places]
    for layer, share, scored in cut:
        scores = Dense(model, group, prompt, hidden_from).attention[scored].mean(0)[-1]
        survivors = []
        for place, own in zip(places, left, strict=True):
            count = min(len(own), max(1, int(np.floor(share * len(place) + 0.5))))
            order = sorted(own, key=lambda token: (-scores[place[token]], token))
            survivors.append(sorted(order[:count]))
            if count < len(order):
                worst, best = scores[place[order[count - 1]]], scores[place[order[count]]]
                margin = min(margin, (worst - best) / worst)
        hidden_from[layer] = dropped(places, survivors)
        left = survivors
        kept.append(survivors)
    return kept, margin


def dropped(places: list[list[int]], kept: list[list[int]]) -> list[int]:
    return [p for place, own in zip(places, kept, strict=True) for i, p in enumerate(place) if i not in set(own)]


def kept_of(plan: KeepPlan) -> Kept:
    return [[part.tolist() for part in site.kept.split(site.kept_offsets.diff().tolist())] for site in plan.sites]


def oracle_logprobs(model: Any, group: RolloutGroup, rollout: Rollout, plan: KeepPlan | None) -> torch.Tensor:
    """float32 [T], log-probs of a completion with the plan's tokens alone, their positions as they were."""
    hidden_from: dict[int, list[int]] = {}
    if plan is not None:
        places = image_places(model, group)
        for site, kept in zip(plan.sites, kept_of(plan), strict=True):
            hidden_from[site.layer] = dropped(places, kept)
    logits = Dense(model, group, rollout.token_ids, hidden_from).logits[len(group.prompt_ids) - 1 : -1]
    temperature = group.request.sampling.temperature or 1.0
    return (logits / temperature).log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]


def worst(model: Any, groups: Iterable[RolloutGroup], plan: KeepPlan | None = None) -> float:
    """The largest difference of recorded log-probs to the oracle's, under the groups' own plans or another."""
    return max(
        float((oracle_logprobs(model, group, rollout, plan or group.keep) - rollout.logprobs).abs().max())
        for group in groups
        for rollout in group.rollouts
    )


def check(model: Any, groups: Iterable[RolloutGroup], cut: Cut) -> None:
    """Kept sets and log-probs are the oracle's."""
    for group in groups:
        assert group.error is None
        assert group.keep is not None, group.request_id
        assert torch.equal(group.keep.positions, group.prompt_positions)
        if group.pixel_values is None:
            assert group.keep.sites == (), "nothing to drop"
        else:
            expected, margin = oracle_kept(model, group, cut)
            assert margin > MARGIN, "the inputs decide nothing"
            assert kept_of(group.keep) == expected
            assert [site.layer for site in group.keep.sites] == [layer for layer, _, _ in cut]
        assert worst(model, [group]) < TOLERANCE
