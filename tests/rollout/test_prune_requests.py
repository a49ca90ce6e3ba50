"""Pruned requests in an engine: what they share, what is recorded of them, and what happens when something fails."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from foveate.rollout.config import PruneConfig, SamplingParams
from foveate.rollout.pages import pages_for
from foveate.rollout.pruners.divprune import DivPrune
from foveate.rollout.pruners.random import RandomPruner
from foveate.rollout.segments import spans
from foveate.rollout.testing import VISION_FAMILIES, tiny_model
from foveate.rollout.types import KeepPlan, Request, RolloutGroup, SiteKeep

HALF = PruneConfig("visionzip", 0.5)
SAMPLING = {"max_tokens": 8, "seed": 3, "ignore_eos": True}


def kept(group: RolloutGroup) -> list[int]:
    return group.keep.sites[0].kept.tolist()


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2_5_vl").requires_grad_(False)


@pytest.fixture
def look(chat, picture) -> Callable[..., Request]:
    """look(seed, text): a request with one picture of 15 tokens."""
    return lambda seed=0, text="What?", n=2, **values: chat(text, [picture(84, 140, seed)], n=n, **SAMPLING | values)


def test_pages_and_counters(model, make_engine, look):
    """Exact pages of a running prompt with and without pruning, and what the statistics say."""
    for config, kept_tokens in ((None, 15), (PruneConfig("divprune", 0.2), 3)):
        engine = make_engine(model, prune=config, page_size=4)
        engine.add_request(look())
        engine.step()
        group = engine._desk.groups["request-0"]
        system, rest = (stop - start for start, stop in spans(group.prompt))
        assert engine.memory_report()["kv_pages_used"] == sum(pages_for(t, 4) for t in (system, rest)) + 2
        stats = engine.stats()
        assert (stats["image_tokens"], stats["image_tokens_dropped"]) == (15, 15 - kept_tokens)
        assert stats["prefilled_tokens"] == system + rest
        while engine.has_unfinished:
            (done,) = engine.step() or (None,)
        assert len(done.prompt_ids) - system - rest == 15 - kept_tokens


def test_what_requests_share(model, make_engine, look):
    """Prompt segments by image and configuration; the system message, which no image reaches, with every one."""
    engine = make_engine(model, prune=HALF)
    requests = [look(), look(), dataclasses.replace(look(), prune=PruneConfig("divprune")), look(1)]
    groups = engine.generate([*requests, dataclasses.replace(look(), prune=None)], strict=True)
    assert engine.stats()["shared_segments"] == 4 + 1
    assert kept(groups[0]) == kept(groups[1]) != kept(groups[2])
    for name in ("positions", "next_position", "config_hash"):
        ours, others = (getattr(group.keep, name) for group in groups[:2])
        assert torch.equal(ours, others) if name == "positions" else ours == others
    for first, second in zip(groups[0].rollouts, groups[1].rollouts, strict=True):
        assert first.token_ids.tolist() == second.token_ids.tolist()


def test_one_selection_serves_all_who_need_it(model, make_engine, look, monkeypatch):
    """Made once while a prompt that needs it is alive; a preempted sample gets what was recorded."""
    calls = []
    select = DivPrune.select
    monkeypatch.setattr(
        DivPrune, "select", lambda self, images, *rest: calls.append(len(images)) or select(self, images, *rest)
    )
    engine = make_engine(model, prune=PruneConfig("divprune"), vision_cache_memory=0, kv_memory=45_000)
    requests = [look(0, f"{i}?", n=3, max_tokens=30) for i in range(3)]
    groups = engine.generate(requests, strict=True)
    assert engine.stats()["preempted"] > 0
    assert calls == [1]
    assert engine.stats()["images_encoded"] > 1
    assert len({tuple(kept(group)) for group in groups}) == 1


@pytest.mark.parametrize("vision_changed", [False, True])
def test_updates_in_flight(vision_changed, make_engine, look):
    """A group keeps its plan and its versions over an update; requests that come later select by the new tower."""
    model = tiny_model("qwen2_5_vl").requires_grad_(False)
    engine = make_engine(model, prune=PruneConfig("divprune", 0.4), max_batch_tokens=20, kv_memory=30_000)
    engine.add_request(dataclasses.replace(look(n=3, max_tokens=40), request_id="old"))
    for _ in range(12):
        engine.step()
    with torch.no_grad():
        for parameter in model.model.visual.parameters() if vision_changed else ():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights(in_flight="keep", vision_changed=vision_changed)
    engine.add_request(dataclasses.replace(look(), request_id="new"))
    groups = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    old, new = groups["old"], groups["new"]
    assert engine.stats()["preempted"] > 0
    (before,) = make_engine(tiny_model("qwen2_5_vl"), prune=PruneConfig("divprune", 0.4)).generate([look()])
    (after,) = make_engine(model, prune=PruneConfig("divprune", 0.4)).generate([look()])
    assert kept(old) == kept(before)
    assert kept(new) == kept(after)
    assert (kept(new) == kept(old)) is not vision_changed
    assert (old.keep.language_version, old.keep.vision_version) == (0, 0)
    assert (new.keep.language_version, new.keep.vision_version) == (1, int(vision_changed))


def test_scores_follow_the_plan(make_engine, model, look):
    """What the group recorded counts: another configuration of the engine, another plan, another version."""
    engine = make_engine(model, prune=HALF, deterministic=True)
    groups = engine.generate([look(), look(1)], strict=True)
    plain = make_engine(model, deterministic=True)
    for other in (engine, plain):
        for scores, group in zip(other.score(groups), groups, strict=True):
            for score, rollout in zip(scores, group.rollouts, strict=True):
                assert torch.equal(score, rollout.logprobs)
    swapped = dataclasses.replace(groups[0], keep=dataclasses.replace(groups[1].keep))
    assert kept(groups[0]) != kept(groups[1])
    ((score, _),) = plain.score([swapped])
    assert (score - groups[0].rollouts[0].logprobs).abs().max() > 1e-4
    assert torch.equal(plain.score([groups[0], swapped])[1][0], score)  # side by side they do not share


def changed(site: SiteKeep, **fields) -> dict:
    return {"sites": (dataclasses.replace(site, **fields),)}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG_PLANS = {
    r"images of \[15\] tokens, got \[16\]": lambda s: changed(s, num_tokens=int32(16)),
    r"2 offsets of 8 kept tokens, got \[0, 7\]": lambda s: changed(s, kept_offsets=int32(0, 7)),
    r"ascending tokens in \[0, 15\), got \[0, 2": lambda s: changed(s, kept=int32(0, 2, 1, 3, 4, 5, 6, 7)),
    r"ascending tokens in \[0, 15\), got \[0, 1": lambda s: changed(s, kept=int32(0, 1, 2, 3, 4, 5, 6, 15)),
    r"the positions of the prompt's kept tokens": lambda s: changed(s, kept=int32(*range(8))),
    r"at most one encoder site": lambda s: {"sites": (s, s)},
    r"\d+, got 3 \(keep.next_position\)": lambda s: {"next_position": 3},
}


@pytest.mark.parametrize("match", WRONG_PLANS)
def test_wrong_plans_are_refused_by_name(match, make_engine, model, look):
    engine = make_engine(model, prune=PruneConfig("strided", 0.5))
    (group,) = engine.generate([look()], strict=True)
    plan = dataclasses.replace(group.keep, **WRONG_PLANS[match](group.keep.sites[0]))
    with pytest.raises(ValueError, match=f"request 'request-0': expected {match}"):
        engine.score([dataclasses.replace(group, keep=plan)])


def test_aborted_requests(make_engine, model, look):
    """A plan once the prompt was computed, none before that."""
    engine = make_engine(model, prune=HALF)
    for steps, has_plan in ((0, False), (2, True)):
        name = engine.add_request(look())
        for _ in range(steps):
            engine.step()
        engine.abort(name)
        (group,) = engine.step()
        assert (group.keep is not None) is has_plan
        assert group.error is None


def test_a_pruner_that_fails_concerns_its_images_alone(make_engine, model, look, monkeypatch):
    select, refused = RandomPruner.select, []

    def fail(self, images, counts, backend=None):
        if any(image.content_hash in refused for image in images):
            raise ArithmeticError("not this one")
        return select(self, images, counts, backend)

    monkeypatch.setattr(RandomPruner, "select", fail)
    config = {"prune": PruneConfig("random"), "deterministic": True}
    engine = make_engine(model, **config)
    (first,), (second,) = engine.generate([look(0)], strict=True), engine.generate([look(1)], strict=True)
    refused.append(next(iter(engine._runner.vision._entries)))
    zipped = dataclasses.replace(look(0), prune=HALF)
    engine = make_engine(model, **config)
    groups = engine.generate([look(0), look(1), zipped, Request("Text.", sampling=SamplingParams(**SAMPLING))])
    assert [group.error is None for group in groups] == [False, True, True, True]
    error = "request 'request-0': expected images that random can prune, got ArithmeticError('not this one')"
    assert str(groups[0].error) == error
    assert groups[0].keep is None
    assert torch.equal(groups[1].rollouts[0].logprobs, second.rollouts[0].logprobs)
    assert engine.memory_report()["kv_pages_used"] == 0
    refused.clear()
    assert torch.equal(engine.generate([look(0)])[0].rollouts[0].logprobs, first.rollouts[0].logprobs)


def test_what_is_refused(make_engine, model, look):
    with pytest.raises(ValueError, match=r"no pruning for a text model, got 'random' \(prune\)"):
        make_engine("qwen2", prune=PruneConfig("random"))
    engine, text = make_engine(model, prune=HALF), make_engine("qwen2")
    inside = dataclasses.replace(look(), prune=PruneConfig("fastv"), request_id="mine")
    with pytest.raises(ValueError, match=r"request 'mine': expected EngineConfig.prune, because fastv .*\(prune\)"):
        engine.add_request(inside)
    with pytest.raises(ValueError, match=r"request 'mine': expected no pruning for a text model, got .*\(prune\)"):
        text.add_request(Request("x", prune=HALF, request_id="mine"))
    with pytest.raises(ValueError, match=r"request 'mine': a PruneConfig, 'default' or None, got 'half' \(prune\)"):
        Request("x", prune="half", request_id="mine")
    assert engine.generate([inside, look()])[1].error is None


def test_prompts_that_fit_because_they_are_pruned(make_engine, model, chat, picture):
    """The context counts what enters the language model."""
    request = chat("What?", [picture(280, 280)], max_tokens=5)
    plain, pruned = (
        make_engine(model, max_context=120),
        make_engine(model, max_context=120, prune=PruneConfig("strided", 0.2)),
    )
    (refused,), (group,) = plain.generate([request]), pruned.generate([request])
    assert "expected a prompt shorter than the context of 120" in str(refused.error)
    assert group.error is None
    assert len(group.prompt_ids) > 120
    assert len(pruned.score([group])[0][0]) == len(group.rollouts[0].token_ids)


def test_a_plan_names_are_the_contract():
    """Fields in the order in which callers may give them."""
    names = ["config_hash", "method", "sites", "positions", "next_position", "language_version", "vision_version"]
    assert [field.name for field in dataclasses.fields(KeepPlan)] == names


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_under_pressure(seed, make_engine, chat, picture):
    """Random prompts, configurations, budgets: each request as if alone with room, scores with the rollout's bits."""
    draw = random.Random(seed)
    model = tiny_model(VISION_FAMILIES[seed % 3])
    pictures = [picture(28 * draw.randint(2, 5), 28 * draw.randint(2, 5), index) for index in range(4)]
    prunes = [None, "default", PruneConfig("random", 0.4, seed=seed), PruneConfig("strided", 0.3)]
    prunes += [PruneConfig("visionzip", 0.5, dominant=0.6), PruneConfig("divprune", 0.25), PruneConfig("visionzip", 1)]
    requests = []
    for index in range(10):
        images = draw.choices(pictures, k=draw.randint(0, 3))
        values = {"max_tokens": draw.randint(1, 25), "seed": index, "ignore_eos": True, "n": draw.randint(1, 3)}
        request = chat(draw.choice(["A?", "Bigger?"]), images, system=draw.choice([None, "Look."]), **values)
        requests.append(dataclasses.replace(request, prune=draw.choice(prunes)))
    config = {"prune": draw.choice([None, PruneConfig("divprune", 0.5)]), "deterministic": True}
    budgets = {"max_batch_tokens": draw.choice([5, 40, 500]), "vision_cache_memory": draw.choice([0, 5000, 1 << 20])}
    tight = make_engine(model, **config, **budgets, kv_memory=100_000, page_size=draw.choice([4, 8]))
    roomy = make_engine(model, **config)
    for request, group in zip(requests, tight.generate(requests, strict=True), strict=True):
        (alone,) = roomy.generate([request], strict=True)
        (scores,) = roomy.score([group])
        for rollout, other, score in zip(group.rollouts, alone.rollouts, scores, strict=True):
            assert torch.equal(rollout.token_ids, other.token_ids)
            assert torch.equal(rollout.logprobs, other.logprobs)
            assert torch.equal(rollout.logprobs, score)
        assert (group.keep is None) == (alone.keep is None)
        if group.keep is not None:
            assert kept(group) == kept(alone)
            assert torch.equal(group.keep.positions, alone.keep.positions)
    assert tight.memory_report()["kv_pages_used"] == 0
