"""Pruning before the language model, against transformers' own module on embeddings whose dropped rows are removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from foveate.rollout.config import PruneConfig
from foveate.rollout.pruning import ENCODER_METHODS
from foveate.rollout.testing import VISION_FAMILIES, tiny_model
from foveate.rollout.types import KeepPlan, Request, Rollout, RolloutGroup, VisionInputs
from foveate.rollout.vision import VisionEncoder
from foveate.testing.pruned_groups import images_request

TOLERANCE = 1e-5
FIELDS = ("token_ids", "logprobs", "log_kept", "entropy")
methods = pytest.mark.parametrize("method", ENCODER_METHODS)
CONTROLS = ("random", "strided")
most_methods = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] * (name in CONTROLS)) for name in ENCODER_METHODS]
)


def full_positions(model: nn.Module, group: RolloutGroup, completion: torch.Tensor) -> torch.Tensor:
    """int64 [3, P + T], the model's own positions of the whole prompt and completion."""
    ids = torch.cat([group.prompt_ids, completion])[None]
    is_image = (ids == model.config.image_token_id).int()
    planes, _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=group.image_grid_thw)
    return planes[:, 0]


def rows_of(group: RolloutGroup, plan: KeepPlan, image_token_id: int) -> tuple[list[int], list[int]]:
    """Prompt rows that are left, and of those the rows of image tokens."""
    places = (group.prompt_ids == image_token_id).nonzero().flatten().tolist()
    site, first, image_rows = plan.sites[0], 0, []
    for index, count in enumerate(site.num_tokens.tolist()):
        own = site.kept[site.kept_offsets[index] : site.kept_offsets[index + 1]].tolist()
        image_rows += [places[first + token] for token in own]
        first += count
    text = [row for row in range(len(group.prompt_ids)) if row not in set(places)]
    return sorted(text + image_rows), image_rows


def image_levels(model: nn.Module, group: RolloutGroup, plan: KeepPlan) -> torch.Tensor:
    """float [levels, kept tokens, hidden]: features of each image alone, dropped and merged by the plan."""
    site, levels, entry = plan.sites[0], [], 0
    patches = group.image_grid_thw.prod(1).tolist()
    for index, pixels in enumerate(group.pixel_values.split(patches)):
        output = model.model.get_image_features(pixels, group.image_grid_thw[index : index + 1], return_dict=True)
        deep = getattr(output, "deepstack_features", None) or []
        deep = [level if isinstance(level, torch.Tensor) else level[0] for level in deep]
        features = torch.stack([output.pooler_output[0], *deep])
        for token in site.kept[site.kept_offsets[index] : site.kept_offsets[index + 1]].tolist():
            row = features[:, token]
            if site.merge_offsets is not None and site.merge_offsets[entry] < site.merge_offsets[entry + 1]:
                row = torch.zeros_like(row)
                for at in range(int(site.merge_offsets[entry]), int(site.merge_offsets[entry + 1])):
                    row = row + site.merge_weight[at] * features[:, site.merge_source[at]]
            levels.append(row)
            entry += 1
    return torch.stack(levels, dim=1)


def oracle(
    model: nn.Module, group: RolloutGroup, rollout: Rollout, plan: KeepPlan, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [T], log-probs of a completion: dense, one sequence, rows and their positions dropped by hand."""
    completion, prompt_len = rollout.token_ids, len(group.prompt_ids)
    embedded = model.get_input_embeddings()(torch.cat([group.prompt_ids, completion]))
    planes = full_positions(model, group, completion)
    extra = {}
    rows = list(range(prompt_len))
    if group.pixel_values is not None:
        levels = image_levels(model, group, plan)
        rows, image_rows = rows_of(group, plan, model.config.image_token_id)
        embedded[image_rows] = levels[0]
        if len(levels) > 1:
            is_image = torch.zeros(len(rows) + len(completion), dtype=torch.bool)
            is_image[[rows.index(row) for row in image_rows]] = True
            extra = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": list(levels[1:])}
    rows += range(prompt_len, prompt_len + len(completion))
    planes = planes[:, rows] if positions is None else positions
    size = len(rows)
    mask = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]
    out = model.model.language_model(
        inputs_embeds=embedded[rows][None], position_ids=planes[:, None], attention_mask=mask, use_cache=False, **extra
    )
    logits = model.lm_head(out.last_hidden_state[0, -len(completion) - 1 : -1]).float()
    temperature = group.request.sampling.temperature or 1.0
    return (logits / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0]


def worst(model: nn.Module, groups: Iterable[RolloutGroup], plan: KeepPlan | None = None) -> float:
    """The largest difference of recorded log-probs to the oracle's under the groups' own plans or another."""
    with torch.no_grad():
        return max(
            float((oracle(model, group, rollout, plan or group.keep) - rollout.logprobs).abs().max())
            for group in groups
            for rollout in group.rollouts
        )


def same(groups: list[RolloutGroup], others: list[RolloutGroup]) -> bool:
    """Whether all rollouts have the same bits."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for group, other in zip(groups, others, strict=True)
        for a, b in zip(group.rollouts, other.rollouts, strict=True)
        for name in FIELDS
    )


def kept_of(group: RolloutGroup) -> list[list[int]]:
    site = group.keep.sites[0]
    return [part.tolist() for part in site.kept.split(site.kept_offsets.diff().tolist())]


@pytest.fixture
def requests(chat, picture) -> Callable[..., list[Request]]:
    """(n, **sampling): images wide, tall, square and of four tokens, one twice in a prompt, and a prompt without."""

    def make(n: int = 2, **sampling) -> list[Request]:
        wide, tall, square, tiny = picture(56, 168), picture(168, 56), picture(112, 112), picture(56, 56)
        sampling = {"max_tokens": 9, "seed": 5, "ignore_eos": True, **sampling}
        return [
            chat("What is it?", [wide], n=n, **sampling),
            chat("Which is larger?", [tall, square, wide], n=n, **sampling),
            chat("The same?", [square, tiny, square], system=None, n=n, **sampling),
            chat("No image.", n=n, **sampling),
        ]

    return make


@methods
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_logprobs_are_those_of_the_pruned_prompt(family, method, make_engine, requests):
    model = tiny_model(family, seed=1).requires_grad_(False)
    for keep, max_tokens in ((0.25, 9), (0.6, 50)):
        engine = make_engine(model, prune=PruneConfig(method, keep))
        groups = engine.generate(requests(n=1, temperature=1.2, max_tokens=max_tokens), strict=True)
        assert worst(model, groups) < TOLERANCE
        for group, scores in zip(groups, engine.score(groups), strict=True):
            for rollout, score in zip(group.rollouts, scores, strict=True):
                torch.testing.assert_close(score, rollout.logprobs, atol=TOLERANCE, rtol=0)


@most_methods
@pytest.mark.parametrize(("keep", "kept"), [(0.01, 1), (0.99, 9)])
def test_images_of_one_token(keep, kept, method, make_engine):
    """They stay whatever is asked for, beside others of which one token stays, or all; in chunks that cut them."""
    model = tiny_model("qwen2_5_vl", seed=1).requires_grad_(False)
    request = images_request([[1, 2, 2], [1, 6, 6], [1, 2, 2]])
    engine = make_engine(model, prune=PruneConfig(method, keep), max_batch_tokens=3)
    groups = engine.generate([request, images_request([[1, 2, 2]])], strict=True)
    assert [len(own) for own in kept_of(groups[0])] == [1, kept, 1]
    assert kept_of(groups[1]) == [[0]]
    assert worst(model, groups) < TOLERANCE


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_wrong_plans_and_positions_are_seen(family, make_engine, requests, chat, picture):
    """The oracle with a plan of another prompt, with positions renumbered, with text moved up: far beyond rounding."""
    model = tiny_model(family, seed=1).requires_grad_(False)
    engine = make_engine(model, prune=PruneConfig("visionzip"))
    sampling = {"max_tokens": 9, "seed": 5, "ignore_eos": True}
    group, other = engine.generate(
        [chat("A?", [picture(112, 140, seed)], **sampling) for seed in range(2)], strict=True
    )
    assert kept_of(group) != kept_of(other)
    assert worst(model, [group]) < TOLERANCE
    assert worst(model, [group], other.keep) > 10 * TOLERANCE
    (rollout,) = group.rollouts
    size = group.keep.positions.shape[1] + len(rollout.token_ids)
    right = torch.cat(
        [group.keep.positions, group.next_position + torch.arange(len(rollout.token_ids)).expand(3, -1)], 1
    )
    renumbered = torch.arange(size).expand(3, -1)
    early = right - 3 * (torch.arange(size) >= size - len(rollout.token_ids))
    swapped = right[[0, 2, 1]]
    with torch.no_grad():
        for positions, is_right in ((right, True), (renumbered, False), (early, False), (swapped, False)):
            difference = (oracle(model, group, rollout, group.keep, positions.long()) - rollout.logprobs).abs().max()
            assert (difference < TOLERANCE) if is_right else (difference > 10 * TOLERANCE)


@methods
def test_keeping_everything_changes_no_bit(method, make_engine, requests):
    model = tiny_model("qwen2_5_vl")
    plain = make_engine(model, deterministic=True).generate(requests(), strict=True)
    engine = make_engine(model, deterministic=True, prune=PruneConfig(method, 1.0))
    groups = engine.generate(requests(), strict=True)
    assert same(groups, plain)
    for group in groups:
        assert all(kept == list(range(len(kept))) for kept in kept_of(group))
        assert torch.equal(group.keep.positions, group.prompt_positions)
        assert group.keep.sites[0].merge_source is None


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_what_a_group_says_of_its_prompt(family, make_engine, requests):
    """The whole prompt as without pruning; the plan has positions of what is left, exact counts, types and versions."""
    model = tiny_model(family)
    plain = make_engine(model).generate(requests(), strict=True)
    config = PruneConfig("divprune", 0.3)
    for group, other in zip(make_engine(model, prune=config).generate(requests(), strict=True), plain, strict=True):
        assert other.keep is None
        for name in ("prompt_ids", "prompt_positions", "segments"):
            assert torch.equal(getattr(group, name), getattr(other, name))
        plan, site = group.keep, group.keep.sites[0]
        assert (plan.config_hash, plan.method, len(plan.sites)) == (config.config_hash, "divprune", 1)
        assert (plan.language_version, plan.vision_version) == (0, 0)
        assert plan.next_position == group.next_position == other.next_position
        sizes = [] if group.image_grid_thw is None else (group.image_grid_thw.prod(1) // 4).tolist()
        assert (site.kind, site.layer, site.num_tokens.tolist()) == ("encoder", 0, sizes)
        assert site.kept_offsets.diff().tolist() == [max(1, int(0.3 * size + 0.5)) for size in sizes]
        rows, _ = rows_of(group, plan, model.config.image_token_id)
        full = full_positions(model, group, group.rollouts[0].token_ids)
        assert plan.positions.tolist() == full[:, rows].tolist()
        assert full[:, len(group.prompt_ids)].tolist() == [plan.next_position] * 3
        for tensor in (plan.positions, site.num_tokens, site.kept, site.kept_offsets):
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()


@most_methods
def test_chunks_and_preemption_change_no_bit(method, make_engine, requests):
    """Prefills that cut images, samples that wait or are thrown out and computed again: same plans, same bits."""
    model = tiny_model("qwen2_5_vl")
    config = {"prune": PruneConfig(method, 0.5), "deterministic": True}
    wanted = requests(max_tokens=24)
    roomy = make_engine(model, **config)
    tight = make_engine(model, **config, max_batch_tokens=11, kv_memory=75_000)
    expected, groups = roomy.generate(wanted, strict=True), tight.generate(wanted, strict=True)
    assert same(groups, expected)
    assert [kept_of(group) for group in groups] == [kept_of(group) for group in expected]
    assert tight.stats()["preempted"] > 0
    for scores, group in zip(tight.score(groups), groups, strict=True):
        assert all(torch.equal(score, rollout.logprobs) for score, rollout in zip(scores, group.rollouts, strict=True))
    assert tight.memory_report()["kv_pages_used"] == 0


@most_methods
def test_plans_do_not_depend_on_the_batch(method, make_engine, chat, picture):
    """64 requests together, in another order and alone; default mode, where features differ in their last bits."""
    model = tiny_model("qwen2_5_vl")
    config = PruneConfig(method, 0.4)
    pictures = [picture(56 + 28 * (seed % 5), 56 + 28 * (seed % 4), seed) for seed in range(20)]
    wanted = [chat("?", [pictures[i % 20], pictures[i * 7 % 20]], system=None, max_tokens=1) for i in range(64)]
    engine = make_engine(model, prune=config, kv_memory=1 << 24)
    together = [kept_of(group) for group in engine.generate(wanted, strict=True)]
    assert together == [kept_of(group) for group in make_engine(model, prune=config).generate(wanted[::-1])][::-1]
    for index in range(0, 64, 13):
        (alone,) = make_engine(model, prune=config).generate([wanted[index]])
        assert kept_of(alone) == together[index]


def test_methods_and_shares_mixed_in_a_batch(make_engine, chat, picture):
    """Each request as if alone with its own configuration; None as in an engine without pruning."""
    model = tiny_model("qwen3_vl")
    prunes = [PruneConfig(method, keep) for method in ENCODER_METHODS for keep in (0.3, 0.8)] + [None, "default"]
    base = chat("Where?", [picture(112, 84), picture(84, 84)], n=2, max_tokens=6, seed=1, ignore_eos=True)
    wanted = [dataclasses.replace(base, prune=prune) for prune in prunes]
    engine = make_engine(model, deterministic=True, prune=PruneConfig("strided", 0.5))
    groups = engine.generate(wanted, strict=True)
    for prune, group in zip(prunes, groups, strict=True):
        config = PruneConfig("strided", 0.5) if prune == "default" else prune
        (alone,) = make_engine(model, deterministic=True, prune=config).generate([base], strict=True)
        assert same([group], [alone])
        assert (group.keep is None) == (config is None)
        assert group.keep is None or group.keep.config_hash == config.config_hash
    assert len({tuple(map(tuple, kept_of(group))) for group in groups if group.keep}) == 9
    for scores, group in zip(engine.score(groups), groups, strict=True):
        assert all(torch.equal(score, rollout.logprobs) for score, rollout in zip(scores, group.rollouts, strict=True))


def test_features_of_a_pass_together_are_not_selected_from(make_engine, chat, picture, monkeypatch):
    """An image that came with others for a request without pruning passes the tower again, alone, and only once."""
    model = tiny_model("qwen2_5_vl")
    engine = make_engine(model)
    pictures = [picture(84, 84, seed) for seed in range(3)]
    engine.generate([chat("Plain.", pictures, max_tokens=1)], strict=True)
    assert engine.stats()["images_encoded"] == 3
    pruned = dataclasses.replace(chat("Pruned.", pictures[:1], max_tokens=1), prune=PruneConfig("divprune"))
    zipped = dataclasses.replace(pruned, prune=PruneConfig("visionzip"))
    for request, encoded in ((pruned, 4), (pruned, 4), (zipped, 5), (zipped, 5), (pruned, 5)):
        engine.generate([request], strict=True)
        assert engine.stats()["images_encoded"] == encoded
    cache, run_tower, together = engine._runner.vision, VisionEncoder._run_tower, []
    monkeypatch.setattr(
        VisionEncoder, "_run_tower", lambda self, images: together.append(len(images)) or run_tower(self, images)
    )
    several = [picture(84, 84, seed) for seed in range(5, 9)]
    mixed = [dataclasses.replace(chat("All.", several[:2], max_tokens=1), prune=PruneConfig("divprune"))]
    engine.generate([*mixed, chat("Plain.", several[2:], max_tokens=1)], strict=True)
    assert sorted(together) == [1, 1, 2]
    assert engine.stats()["image_bytes"] == sum(entry.nbytes for entry in cache._entries.values())


def test_a_trainers_inputs_and_ready_ids(make_engine, processor, picture, chat):
    engine = make_engine("qwen2_5_vl", deterministic=True, prune=PruneConfig("visionzip", 0.5))
    image = picture(84, 140)
    request = chat("What?", [image], n=2, max_tokens=7, seed=2)
    (group,) = engine.generate([request], strict=True)
    made = processor.image_processor(images=[image], return_tensors="pt")
    vision = VisionInputs(made["pixel_values"], made["image_grid_thw"])
    prefix = int(group.segments[0])
    ready = Request(group.prompt_ids, vision=vision, n=2, sampling=request.sampling, prefix_len=prefix)
    (other,) = engine.generate([ready], strict=True)
    assert same([group], [other])
    assert kept_of(group) == kept_of(other)
    assert other.segments.tolist() == group.segments.tolist()
