"""Requests that go on over an update of the weights: what is kept, what is computed anew, and what the caller learns.

The truth is transformers' decoder with its own cache: fed the same tokens in the same parts, with the weights changed
in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, Rollout, RolloutGroup, VisionInputs

TOLERANCE = 5e-5  # as in conftest
SEEDS = (0, 5, 6, 7)


@pytest.fixture
def family() -> str:
    return "llama"


@pytest.fixture
def states(family) -> list[dict[str, torch.Tensor]]:
    """Weights of each version."""
    return [tiny_model(family, seed=seed).state_dict() for seed in SEEDS]


def decoder_of(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


def embed(model, group: RolloutGroup, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of prompt and completion under the model's present weights, images in place."""
    hidden = model.get_input_embeddings()(ids)
    if group.pixel_values is not None:
        features = model.get_image_features(group.pixel_values, group.image_grid_thw).pooler_output
        hidden[ids == model.config.image_token_id] = torch.cat(list(features))
    return hidden


@torch.no_grad()
def replay(model, states, group: RolloutGroup, rollout: Rollout, ends: list[int]) -> torch.Tensor:
    """float32 [T]: log-probs of the drawn tokens, tokens [ends[v - 1], ends[v]) of prompt and completion fed with
    states[v] into one cache, the rest with the weights after those."""
    from transformers import DynamicCache

    prompt_len, count = len(group.prompt_ids), len(rollout.token_ids)
    ids = torch.cat([group.prompt_ids, rollout.token_ids])
    later = torch.arange(count, dtype=torch.int64).expand(3, -1) + group.next_position
    positions = torch.cat([group.prompt_positions.long(), later], dim=1)
    positions = positions[:, None] if group.pixel_values is not None else positions[:1]
    cache, start, rows = DynamicCache(), 0, []
    for version, end in enumerate([*ends, len(ids)]):
        model.load_state_dict(states[version])
        if end > start:
            hidden = decoder_of(model)(
                inputs_embeds=embed(model, group, ids)[None, start:end],
                position_ids=positions[..., start:end],
                past_key_values=cache,
                attention_mask=torch.ones(1, end, dtype=torch.int64),
                use_cache=True,
            ).last_hidden_state
            rows.append(model.lm_head(hidden)[0])
        start = max(start, end)
    logits = torch.cat(rows)[prompt_len - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, rollout.token_ids[:, None])[:, 0]


def load(model, weights) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def finish(engine) -> dict[str, RolloutGroup]:
    groups = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    return groups


def text(length: int, max_tokens: int, seed: int = 0, **fields) -> Request:
    ids = random.Random(seed).choices(range(250), k=length)
    return Request(ids, sampling=SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True), **fields)


@pytest.mark.parametrize("fuse", [True, False])
def test_kept_keys_and_values_and_new_weights(fuse, states, make_engine):
    """Three updates while two samples run; the third comes with none drawn since the second."""
    model = tiny_model("llama")
    engine = make_engine(model, fuse=fuse)
    name = engine.add_request(text(11, 12, n=2))
    for version, steps in ((1, 4), (2, 3), (3, 0)):
        for _ in range(steps):
            engine.step()
        assert engine.update_weights(states[version], in_flight="keep") == version
    group = finish(engine)[name]
    assert engine.stats()["prefilled_tokens"] == 11
    for rollout in group.rollouts:
        assert rollout.weight_versions == ((0, 4, 0), (4, 7, 1), (7, 12, 3))
        expected = replay(tiny_model("llama"), states, group, rollout, [11 + 3, 11 + 6, 11 + 6])
        torch.testing.assert_close(rollout.logprobs, expected, atol=TOLERANCE, rtol=0)
        plain = replay(tiny_model("llama"), states, group, rollout, [0, 0, 0])
        assert not torch.allclose(rollout.logprobs[7:], plain[7:], atol=1e-2), "the old keys count"
    assert (group.kept_versions, group.weight_version) == ((0, 1, 2), None)


def test_in_place_changes_and_keep(states, make_engine):
    model = tiny_model("llama")
    engine = make_engine(model)
    name = engine.add_request(text(5, 6))
    for _ in range(2):
        engine.step()
    load(model, states[1])
    engine.update_weights(in_flight="keep")
    group = finish(engine)[name]
    expected = replay(tiny_model("llama"), states, group, group.rollouts[0], [5 + 1])
    torch.testing.assert_close(group.rollouts[0].logprobs, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_prompt_computed_under_two_versions(family, steps, states, make_engine):
    """Chunks of 5: the update comes in the middle of the prompt, of its only image where there is one.

    What was embedded keeps its keys; the rest of the image takes the new tower's features.
    """
    model = tiny_model(family)
    engine = make_engine(model, max_batch_tokens=5)
    ids, vision = list(range(1, 17)), None
    if hasattr(model.config, "image_token_id"):
        grid = torch.tensor([[1, 4, 10]])
        vision = VisionInputs(torch.rand(40, model.config.vision_config.in_channels * 2 * 14 * 14), grid)
        ids = [1, 2, 3, *[model.config.image_token_id] * 10, 4, 5, 6]
    sampling = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
    name = engine.add_request(Request(ids, vision=vision, n=2, sampling=sampling))
    for _ in range(steps):
        engine.step()
    assert engine.stats()["prefilled_tokens"] == 5 * steps
    engine.update_weights(iter(states[1].items()), in_flight="keep")
    assert all(not segment.features for segment in engine._desk.groups[name].path)
    group = finish(engine)[name]
    assert engine.stats()["prefilled_tokens"] == 16
    assert engine.stats()["images_encoded"] == (vision is not None) * (1 if steps == 3 else 2)
    for rollout in group.rollouts:
        assert rollout.weight_versions == ((0, 5, 1),)
        if family == "qwen3_vl":  # its decoder adds features after its first layers, which `replay` does not
            continue
        expected = replay(tiny_model(family), states, group, rollout, [5 * steps])
        torch.testing.assert_close(rollout.logprobs, expected, atol=TOLERANCE, rtol=0)
    assert (group.kept_versions, group.weight_version) == ((0,), None)


def test_features_of_a_frozen_tower_go_on(make_engine):
    model = tiny_model("qwen2_5_vl")
    model.model.visual.requires_grad_(False)
    engine = make_engine(model, max_batch_tokens=5)
    vision = VisionInputs(torch.rand(40, 1176), torch.tensor([[1, 4, 10]]))
    ids = [1, *[model.config.image_token_id] * 10, 2]
    engine.add_request(Request(ids, vision=vision, sampling=SamplingParams(max_tokens=3)))
    engine.step()
    engine.update_weights(in_flight="keep")
    finish(engine)
    assert (engine.stats()["images_encoded"], engine.vision_version) == (1, 0)


def test_what_waits_and_what_comes_later_is_of_the_new_weights(states, make_engine):
    """Four groups of one prompt: one runs over the update, one waits, one comes after it, one brief saw another."""
    engine = make_engine(tiny_model("llama"), max_sequences=2)
    running, waiting = (engine.add_request(text(20, 9, n=2)) for _ in range(2))
    engine.step()
    assert engine.stats()["waiting"] == 1
    engine.update_weights(states[1], in_flight="keep")
    later = engine.add_request(text(20, 9, n=2))
    groups = finish(engine)
    fresh = make_engine(tiny_model("llama", seed=SEEDS[1])).generate([text(20, 9, n=2)])[0]
    for name in (waiting, later):
        assert groups[name].weight_version == 1
        assert groups[name].kept_versions == ()
        for rollout, twin in zip(groups[name].rollouts, fresh.rollouts, strict=True):
            assert rollout.weight_versions == ((0, 9, 1),)
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            torch.testing.assert_close(rollout.logprobs, twin.logprobs, atol=TOLERANCE, rtol=0)
    assert groups[running].weight_version is None
    assert engine.stats()["prefilled_tokens"] >= 40


def test_kept_prompts_are_not_found(states, make_engine):
    """The kept group still holds the prompt that comes again, complete or in part."""
    for steps in (1, 4):
        engine = make_engine(tiny_model("llama"), max_batch_tokens=8)
        engine.add_request(text(20, 9))
        for _ in range(steps):
            engine.step()
        engine.update_weights(states[1], in_flight="keep")
        name = engine.add_request(text(20, 9))
        (group,) = [g for g in finish(engine).values() if g.request_id == name]
        assert (engine.stats()["prefilled_tokens"], engine.stats()["shared_segments"]) == (40, 0)
        fresh = make_engine(tiny_model("llama", seed=SEEDS[1])).generate([text(20, 9)])[0]
        assert group.rollouts[0].token_ids.tolist() == fresh.rollouts[0].token_ids.tolist()
        assert group.weight_version == 1


def test_spans_of_samples_that_end_at_different_times(states, make_engine):
    """One ends before the update, one is aborted right after it, one starts and is aborted after it, one sees two."""
    engine = make_engine(tiny_model("llama"), max_sequences=3)
    short, aborted, long = (engine.add_request(text(4, count)) for count in (2, 9, 9))
    brief = engine.add_request(text(4, 5))
    for _ in range(2):
        groups = {group.request_id: group for group in engine.step()}
    engine.update_weights(states[1], in_flight="keep")
    engine.abort(aborted)
    groups |= {group.request_id: group for group in engine.step()}
    engine.update_weights(states[2], in_flight="keep")
    engine.abort(brief)
    groups |= finish(engine)
    spans = {name: groups[name].rollouts[0].weight_versions for name in (short, aborted, long, brief)}
    assert spans[short] == ((0, 2, 0),)
    assert spans[aborted] == ((0, 2, 0),)
    assert spans[long] == ((0, 2, 0), (2, 3, 1), (3, 9, 2))
    assert spans[brief] == ((0, 1, 1),)
    assert [groups[name].weight_version for name in (short, aborted, long, brief)] == [0, 0, None, 1]


def test_samples_of_a_group_of_which_some_have_ended(states, make_engine):
    """A sample that ended before the update is of its version, though its group ends under another."""
    engine = make_engine(tiny_model("llama"))
    free = engine.generate([text(6, 12, n=4)])[0]
    first = [rollout.token_ids[1].item() for rollout in free.rollouts]
    stop = SamplingParams(max_tokens=12, seed=0, ignore_eos=True, stop_token_ids=(first[0],))
    name = engine.add_request(Request(free.request.prompt, n=4, sampling=stop))
    for _ in range(2):
        engine.step()
    engine.update_weights(states[1], in_flight="keep")
    group = finish(engine)[name]
    versions = [rollout.weight_versions for rollout in group.rollouts]
    assert versions[0] == ((0, 2, 0),)
    assert ((0, 2, 0), (2, 12, 1)) in versions
    assert group.weight_version is None


def test_a_torn_update_loses_no_request(states, make_engine):
    engine = make_engine(tiny_model("llama"))
    name = engine.add_request(text(8, 6))
    for _ in range(3):
        engine.step()
    with pytest.raises(ValueError, match="missing"):
        engine.update_weights(iter(list(states[2].items())[:7]), in_flight="keep")
    assert engine.weight_version == 0
    with pytest.raises(ValueError, match="expected a complete update_weights"):
        engine.step()
    engine.update_weights(iter(states[1].items()), in_flight="keep")
    group = finish(engine)[name]
    assert group.rollouts[0].weight_versions == ((0, 3, 0), (3, 6, 1))
    expected = replay(tiny_model("llama"), states, group, group.rollouts[0], [8 + 2])
    torch.testing.assert_close(group.rollouts[0].logprobs, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture
def small(make_engine) -> Callable:
    """(pages, **EngineConfig fields) -> an engine on llama with that many pages of 4 tokens."""

    def make(pages: int, **config):
        report = make_engine("llama", page_size=4).memory_report()
        memory = pages * report["kv_capacity"] // report["kv_pages"]
        return make_engine("llama", page_size=4, kv_memory=memory, **config)

    return make


def stored_of(engine) -> dict[tuple[str, int], int]:
    """(request id, sample) -> tokens of prompt and completion whose keys it holds."""
    return {
        (s.group.request_id, s.group.sequences.index(s)): sum(x.length for x in (*s.group.path, s.leaf))
        for s in engine._scheduler.running
    }


@pytest.mark.parametrize("pages", [11, 17, 26, 60])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_pressure(pages, steps, states, small):
    """Groups of 2 + 2 x 4 pages: as many samples keep their keys as fit to the end, and those are brief taken.

    The others are computed anew with the new weights, and draw their tokens with those.
    """
    engine = small(pages, max_batch_tokens=16)
    names = [engine.add_request(text(6, 16, seed, n=2)) for seed in range(5)]
    for _ in range(steps):
        engine.step()
    before = stored_of(engine)
    drawn = {name: [len(s.token_ids) for s in engine._desk.groups[name].sequences] for name in names}
    engine.update_weights(states[1], in_flight="keep")
    kept = stored_of(engine)
    assert list(kept) == list(before)[: len(kept)], "a beginning of the order"
    assert all(kept[key] == before[key] for key in kept)
    assert len(kept) >= min(1, len(before))
    full = [len({name for name, _ in list(before)[:count]}) * 2 + count * 4 for count in range(1, len(before) + 1)]
    assert len(kept) == sum(size <= pages for size in full)
    groups: dict[str, RolloutGroup] = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
        running = stored_of(engine)
        assert all(key in running or key[0] in groups or ended(engine, key) for key in kept)
    model = tiny_model("llama")
    for name, group in groups.items():
        for index, rollout in enumerate(group.rollouts):
            count = drawn[name][index]
            assert rollout.weight_versions == tuple(s for s in ((0, count, 0), (count, 16, 1)) if s[1] > s[0])
            fed = [kept.get((name, index), 0)]
            expected = replay(model, states, group, rollout, fed)
            torch.testing.assert_close(rollout.logprobs[count:], expected[count:], atol=TOLERANCE, rtol=0)
            old = replay(model, states, group, rollout, [6 + 16])
            torch.testing.assert_close(rollout.logprobs[:count], old[:count], atol=TOLERANCE, rtol=0)
        was_kept = any(name == key[0] for key in kept)
        assert group.kept_versions == ((0,) if was_kept else ())
        assert group.weight_version == (None if was_kept or any(drawn[name]) else 1)


def ended(engine, key: tuple[str, int]) -> bool:
    return engine._desk.groups[key[0]].sequences[key[1]].finish_reason is not None
