"""Pruned prompts that share segments: each keeps its own selection, by its own configuration, question and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.rollout.config import PruneConfig
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, RolloutGroup
from foveate.testing.hidden_tokens import TOLERANCE, kept_of

HALF = PruneConfig("strided", 0.5)
OTHERS = [PruneConfig("strided", 0.25), PruneConfig("random", 0.5)]  # fewer tokens, and as many
VALUES = {"max_tokens": 5, "ignore_eos": True, "seed": 3}


@pytest.fixture
def model_of() -> Callable[[], nn.Module]:
    return lambda: tiny_model("qwen2_5_vl", num_hidden_layers=4).requires_grad_(False)


@pytest.fixture
def late(picture) -> Callable[..., Request]:
    """late(chat, text): a request whose one picture stands behind its text."""

    def make(chat, text: str, prune: PruneConfig | str | None = "default", **values) -> Request:
        request = chat(text, [picture(84, 140, 0)], **{**VALUES, **values})
        system, user = request.prompt
        content = [{"type": "text", "text": text}, {"type": "image"}, {"type": "text", "text": "?"}]
        return dataclasses.replace(request, prompt=[system, {**user, "content": content}], prune=prune)

    return make


def rest(engine: Engine) -> dict[str, RolloutGroup]:
    groups = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    return groups


def beside(engine: Engine, first: Request, second: Request) -> str:
    """Runs the first until it has selected, then the second up to its text; returns the second's id."""
    engine.add_request(first)
    for _ in range(3):
        engine.step()
    name = engine.add_request(second)
    engine.step()
    group = engine._desk.groups[name]
    assert group.path[0].source is not group.prompt, "the system message is shared"
    assert group.path[-1].source is group.prompt
    assert group.path[-1].length < group.prompt.images[0].start - group.path[-1].span[0]
    return name


@pytest.mark.parametrize("config", OTHERS)
def test_an_abort_takes_no_selection_of_others(config, model_of, chat, late, make_engine):
    """The system message is another configuration's, which has selected from the same image."""
    engine = make_engine(model_of(), prune=HALF, max_batch_tokens=40)
    name = beside(engine, late(chat, "A", max_tokens=20), late(chat, "word " * 40, config))
    engine.abort(name)
    groups = rest(engine)
    assert [group.error for group in groups.values()] == [None, None]
    assert groups[name].keep is None
    assert engine.memory_report()["kv_pages_used"] == 0


@pytest.mark.parametrize("config", OTHERS)
def test_a_preempted_request_takes_no_selection_of_others(config, model_of, chat, late, make_engine):
    model = model_of()
    request = late(chat, "word " * 40, config)
    (alone,) = make_engine(model, prune=config).generate([request], strict=True)
    engine = make_engine(model, prune=HALF, max_batch_tokens=40)
    name = beside(engine, late(chat, "A", max_tokens=20), request)
    engine._scheduler._preempt()
    groups = rest(engine)
    assert engine.stats()["preempted"] == 1
    assert kept_of(groups[name].keep) == kept_of(alone.keep)
    assert groups[name].rollouts[0].token_ids.tolist() == alone.rollouts[0].token_ids.tolist()
    assert (groups[name].rollouts[0].logprobs - alone.rollouts[0].logprobs).abs().max() < TOLERANCE


def test_a_plan_says_which_weights_selected(model_of, chat, late, make_engine):
    """Not those that the request was first admitted with."""
    for config in (PruneConfig("fastv", 0.5), HALF):
        engine = make_engine(model_of(), prune=config, max_batch_tokens=16)
        name = engine.add_request(late(chat, "word " * 40))
        engine.step()
        group = engine._desk.groups[name]
        assert sum(segment.length for segment in group.path) == 16
        engine._scheduler._preempt()
        engine.update_weights(in_flight="keep")
        keep = rest(engine)[name].keep
        assert (keep.language_version, keep.vision_version) == (1, int(engine.vision_version))


@pytest.mark.parametrize("config", [PruneConfig("fastv", 0.5), HALF])
def test_a_kept_prompt_says_which_weights_selected(config, model_of, chat, late, make_engine):
    """Two requests share all segments, and their image comes after an update: both selected by the new weights."""
    engine = make_engine(model_of(), prune=config, max_batch_tokens=40)
    names = [engine.add_request(late(chat, "word " * 40)) for _ in range(2)]
    engine.step()
    second = engine._desk.groups[names[1]]
    engine._scheduler._start(second.sequences, (0, 0))
    assert all(segment.source is not second.prompt for segment in second.path)
    engine.update_weights(in_flight="keep")
    groups = list(rest(engine).values())
    assert engine.stats()["preempted"] == 0
    assert [group.kept_versions for group in groups] == [(0,), (0,)]
    assert [group.keep.language_version for group in groups] == [1, 1]


def test_other_questions_behind_a_shared_prefix_select_for_themselves(model_of, chat, picture, make_engine):
    """The prefix ends behind the image; which of its tokens are kept depends on what comes after it."""
    model, config = model_of(), PruneConfig("fastv", 0.3)
    engine = make_engine(model, prune=config)
    requests = [chat(text, [picture(84, 140, 0)], **VALUES) for text in ("A? what", "Bxyz what")]
    image = engine._intake.processor.prepare(requests[0]).images[0]
    end = image.start + image.num_tokens + 1
    requests = [dataclasses.replace(request, prefix_len=end) for request in requests]
    together = engine.generate(requests, strict=True)
    alone = [make_engine(model, prune=config).generate([request], strict=True)[0] for request in requests]
    assert kept_of(alone[0].keep) != kept_of(alone[1].keep)
    for group, other in zip(together, alone, strict=True):
        assert group.segments[0] == end
        assert kept_of(group.keep) == kept_of(other.keep)
        assert (group.rollouts[0].logprobs - other.rollouts[0].logprobs).abs().max() < TOLERANCE


@pytest.fixture
def scored(model_of, chat, picture, make_engine) -> tuple[Engine, RolloutGroup]:
    """An engine that prunes inside the language model, and a finished group."""
    engine = make_engine(model_of(), prune=PruneConfig("fastv", 0.3))
    return engine, engine.generate([chat("A?", [picture(84, 140, 0)], **VALUES)], strict=True)[0]


def with_site(group: RolloutGroup, **fields) -> RolloutGroup:
    sites = (dataclasses.replace(group.keep.sites[0], **fields),)
    return dataclasses.replace(group, keep=dataclasses.replace(group.keep, sites=sites))


def test_one_prompt_is_scored_under_several_plans(scored):
    engine, group = scored
    kept = group.keep.sites[0].kept.tolist()
    free = [token for token in range(15) if token not in kept][: len(kept)]
    other = with_site(group, kept=torch.tensor(free, dtype=torch.int32))
    groups = [group, other, group]
    alone = [engine.score([each])[0][0] for each in groups]
    assert (alone[0] - alone[1]).abs().max() > 100 * TOLERANCE
    for (together,), row in zip(engine.score(groups), alone, strict=True):
        assert (together - row).abs().max() < TOLERANCE


def test_one_prompt_is_scored_in_several_segmentations(scored):
    """Segments are taken as recorded, and shared with those of the same boundaries alone."""
    engine, group = scored
    length = len(group.prompt_ids)
    end = int((group.prompt_ids == engine.model.config.image_token_id).nonzero()[-1]) + 1
    parts = ((end, length - end), (end, 2, length - end - 2), (length,))
    groups = [dataclasses.replace(group, segments=torch.tensor(each, dtype=torch.int32)) for each in parts]
    for (row,) in engine.score(groups):
        assert (row - group.rollouts[0].logprobs).abs().max() < TOLERANCE
    assert engine.memory_report()["kv_pages_used"] == 0
