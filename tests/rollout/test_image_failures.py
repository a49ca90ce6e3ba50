"""A vision tower that raises, out of memory or for any other reason: who pays, and what goes on."""

from __future__ import annotations

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request
from foveate.rollout.vision import VisionEncoder


@pytest.fixture
def limited(make_engine, monkeypatch):
    """limited(patches, **config): an engine whose tower takes that many patches at once, and more raise."""

    def make(patches: int, **config):
        engine = make_engine(tiny_model("qwen2_5_vl"), **config)
        run_tower = VisionEncoder._run_tower

        def limit(self, images):
            if sum(len(each.pixel_values) for each in images) > engine.patches:
                raise torch.OutOfMemoryError("expected less")
            return run_tower(self, images)

        monkeypatch.setattr(VisionEncoder, "_run_tower", limit)
        engine.patches = patches
        return engine

    return make


def outcome(groups) -> list:
    return [[rollout.logprobs.tolist() for rollout in group.rollouts] for group in groups]


@pytest.mark.parametrize("max_batch_tokens", [8192, 30, 7])
def test_an_image_that_the_tower_cannot_take_fails_its_requests_alone(max_batch_tokens, limited, chat, picture):
    """Those that hold it, in the same step or a later one; a shared system message stays, and the engine goes on."""
    small, large = picture(56, 84), picture(168, 168)
    sampling = {"max_tokens": 5, "seed": 3, "ignore_eos": True}
    good = [chat("Small?", [small], n=2, **sampling), Request("Text.", sampling=SamplingParams(**sampling))]
    good.append(chat("No image.", **sampling))
    bad = [chat("Large?", [small, large], n=2, **sampling), chat("Again?", [small, large], **sampling)]
    engine = limited(10**6, deterministic=True, max_batch_tokens=max_batch_tokens)
    expected = outcome(engine.generate(good, strict=True))
    engine._runner.vision.clear()
    engine.patches = 100
    groups = engine.generate([good[0], bad[0], *good[1:], bad[1]])
    assert outcome([groups[0], *groups[2:4]]) == expected
    for group in (groups[1], groups[4]):
        assert "expected images that the vision tower encodes, got OutOfMemoryError" in str(group.error)
        assert repr(group.request_id) in str(group.error)
        assert outcome([group]) == [[[]] * group.request.n]
    assert (engine.memory_report()["kv_pages_used"], engine.has_unfinished) == (0, False)
    engine.patches = 10**6
    assert all(group.error is None for group in engine.generate(bad))


def test_a_tower_that_takes_one_image_at_a_time(limited, chat, picture):
    """Where all images of a step are too much, each passes alone; where none passes, text goes on."""
    requests = [chat("Which?", [picture(84, 84, seed)], max_tokens=5, seed=seed) for seed in range(3)]
    requests += [requests[0], Request("Text.", sampling=SamplingParams(max_tokens=5, seed=1))]
    engine = limited(36)
    groups = engine.generate(requests, strict=True)
    assert (engine.stats()["images_encoded"], engine.stats()["image_hits"]) == (3, 0)
    engine._runner.vision.clear()
    engine.patches = 10**6
    for rollouts, others in zip(outcome(groups), outcome(engine.generate(requests, strict=True)), strict=True):
        torch.testing.assert_close(torch.tensor(rollouts), torch.tensor(others), atol=5e-5, rtol=0)
    engine._runner.vision.clear()
    engine.patches = 0
    assert [group.error is None for group in engine.generate(requests)] == [False] * 4 + [True]
    assert engine.memory_report()["kv_pages_used"] == 0


def test_scores_when_the_tower_fails(limited, chat, picture):
    """The call raises before anything is stored, and can be repeated."""
    engine = limited(10**6)
    groups = engine.generate([chat("Which?", [picture(84, 84)], max_tokens=5, seed=1)], strict=True)
    engine._runner.vision.clear()
    engine.patches = 0
    with pytest.raises(RuntimeError, match="expected images that the vision tower encodes, got OutOfMemoryError"):
        engine.score(groups)
    assert engine.memory_report()["kv_pages_used"] == 0
    engine.patches = 10**6
    torch.testing.assert_close(engine.score(groups)[0][0], groups[0].rollouts[0].logprobs, atol=5e-5, rtol=0)
