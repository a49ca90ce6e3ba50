"""Pruning inside the language model, against transformers' own module: eager, dropped tokens hidden by masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foveate.rollout import stages
from foveate.rollout.config import PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, RolloutGroup
from foveate.testing.hidden_tokens import MARGIN, TOLERANCE, check, eager, image_places, kept_of, oracle_kept, worst
from foveate.testing.pruned_groups import images_request

FASTV, PYRAMID = PruneConfig("fastv", 0.4), PruneConfig("pyramiddrop", 0.6)
METHODS = {
    "fastv": (FASTV, [(2, 0.4, 1)]),  # (first layer without the dropped, share, layer whose attention scores)
    "fastv early": (PruneConfig("fastv", 0.25, layer=1), [(1, 0.25, 0)]),
    "fastv late": (PruneConfig("fastv", 0.7, layer=3), [(3, 0.7, 2)]),
    "pyramiddrop": (PYRAMID, [(1, 0.6, 1), (2, 0.6**2, 2), (3, 0.6**3, 3)]),
    "pyramiddrop twice": (PruneConfig("pyramiddrop", layers=(1, 3), ratios=(0.5, 0.2)), [(1, 0.5, 1), (3, 0.2, 3)]),
}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def requests(chat, picture) -> Callable[..., list[Request]]:
    """(n, **sampling): images wide, tall, square and of four tokens, one twice, and a prompt without."""

    def make(n: int = 2, **sampling) -> list[Request]:
        values = {"max_tokens": 6, "ignore_eos": True, "n": n, **sampling}
        wide, tall, square, dot = picture(56, 168, 1), picture(140, 84, 2), picture(112, 112, 3), picture(56, 56, 4)
        return [
            chat("Which of these is larger?", [wide, square], seed=1, **values),
            chat("And this?", [tall], seed=2, **values),
            chat("No image at all.", seed=3, **values),
            chat("Twice the same, and a dot.", [square, dot, square], seed=4, **values),
        ]

    return make


@pytest.fixture
def model_of() -> Callable[..., nn.Module]:
    return lambda family="qwen2_5_vl", seed=3, **text: eager(tiny_model(family, seed=seed, num_hidden_layers=4, **text))


FAMILIES = [
    pytest.param(family, marks=[] if family == "qwen2_5_vl" else [pytest.mark.slow])
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
]


@methods
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_and_logprobs_are_the_oracles(method, family, model_of, requests, make_engine):
    config, cut = METHODS[method]
    model = model_of(family)
    check(model, make_engine(model, prune=config).generate(requests(), strict=True), cut)


@pytest.mark.parametrize("budget", [3, 8192])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_images_of_one_token(method, budget, model_of, make_engine):
    """They stay whatever is asked for, beside one of which a single token stays; in chunks that cut them."""
    model, share = model_of(), 0.05
    config, cut = METHODS[method]
    engine = make_engine(model, prune=dataclasses.replace(config, keep=share), max_batch_tokens=budget)
    requests = [images_request([[1, 2, 2], [1, 6, 6], [1, 2, 2]]), images_request([[1, 2, 2]])]
    groups = engine.generate(requests, strict=True)
    for group, counts in zip(groups, ([1, 1, 1], [1]), strict=True):
        assert [list(map(len, kept)) for kept in kept_of(group.keep)] == [counts] * len(cut)
    check(model, groups, [(layer, share, scored) for layer, _, scored in cut])


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_after_fifty_tokens(method, model_of, requests, make_engine):
    config, cut = METHODS[method]
    model = model_of(seed=5)
    groups = make_engine(model, prune=config).generate(requests(1, max_tokens=50, temperature=1.2), strict=True)
    assert {len(rollout.token_ids) for group in groups for rollout in group.rollouts} == {50}
    check(model, groups, cut)


def same_bits(groups: list[RolloutGroup], others: list[RolloutGroup]) -> bool:
    """Whether plans, tokens and everything that is recorded of tokens are equal."""
    fields = ("token_ids", "logprobs", "log_kept", "entropy")
    plans = [(a.keep and kept_of(a.keep)) == (b.keep and kept_of(b.keep)) for a, b in zip(groups, others, strict=True)]
    return all(plans) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for group, other in zip(groups, others, strict=True)
        for a, b in zip(group.rollouts, other.rollouts, strict=True)
        for name in fields
    )


def close(groups: list[RolloutGroup], others: list[RolloutGroup]) -> bool:
    """Whether plans and tokens are equal, and log-probs up to rounding."""
    for group, other in zip(groups, others, strict=True):
        if (group.keep and kept_of(group.keep)) != (other.keep and kept_of(other.keep)):
            return False
        for a, b in zip(group.rollouts, other.rollouts, strict=True):
            if a.token_ids.tolist() != b.token_ids.tolist() or (a.logprobs - b.logprobs).abs().max() > TOLERANCE:
                return False
    return True


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_keeping_all_changes_nothing(method, deterministic, model_of, requests, make_engine):
    model = model_of()
    config = PruneConfig(method, 1.0)
    groups = make_engine(model, prune=config, deterministic=deterministic).generate(requests(), strict=True)
    plain = make_engine(model, deterministic=deterministic).generate(requests(), strict=True)
    for group in groups[:2] + groups[3:]:
        whole = [list(range(size)) for size in map(len, image_places(model, group))]
        assert kept_of(group.keep) == [whole] * len(group.keep.sites)
    without_plans = [dataclasses.replace(group, keep=None) for group in groups]
    assert (same_bits if deterministic else close)(without_plans, plain)


@pytest.mark.parametrize("budget", [1, 7, 20, 64])
@pytest.mark.parametrize("method", ["fastv early", "pyramiddrop"])
def test_chunks_change_nothing(method, budget, model_of, requests, make_engine):
    config, cut = METHODS[method]
    model = model_of("qwen3_vl") if budget == 20 else model_of()
    engine = make_engine(model, prune=config, max_batch_tokens=budget)
    groups = engine.generate(requests(), strict=True)
    assert close(groups, make_engine(model, prune=config).generate(requests(), strict=True))
    assert engine.memory_report()["held_hidden"] == engine.memory_report()["kv_pages_used"] == 0
    if budget == 20:
        check(model, groups, cut)


def small(make_engine, model, pages: int, **config) -> Engine:
    """An engine with so many pages."""
    full = make_engine(model, **config).memory_report()
    return make_engine(model, kv_memory=pages * full["kv_capacity"] // full["kv_pages"], **config)


@pytest.mark.parametrize(("method", "pages"), [("fastv", 55), ("pyramiddrop", 95)])
def test_preemption_replays_the_plan(method, pages, model_of, requests, make_engine, monkeypatch):
    """A prompt whose pages were taken is computed again with the tokens it had, though it would now choose others."""
    config, cut = METHODS[method]
    model = model_of()
    values = {"max_tokens": 24, "temperature": 1.1}
    expected = make_engine(model, prune=config).generate(requests(3, **values), strict=True)
    chosen, replayed = [], []
    select = stages.StagePlan.selection

    def count(step, found):
        chosen.append(len(step.choosing))
        replayed.append(len(step.ended) - len(step.choosing))
        return select(step, found)

    monkeypatch.setattr(stages.StagePlan, "selection", count)
    engine = small(make_engine, model, pages, prune=config, max_batch_tokens=23)
    groups = engine.generate(requests(3, **values), strict=True)
    assert engine.stats()["preempted"] > 0
    assert close(groups, expected)
    assert sum(chosen) == 3 * len(cut), "each prompt with images chooses once a stage"
    assert sum(replayed) > 0
    check(model, groups, cut)
    assert engine.memory_report()["kv_pages_used"] == 0


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_deterministic_mode(method, model_of, requests, make_engine):
    """64 requests at once, in small chunks, under preemption, or alone: the same plans and bits, and those of score."""
    config, _ = METHODS[method]
    model = model_of()
    own = requests(1, temperature=1.1)

    def engine(**fields) -> Engine:
        return make_engine(model, prune=config, deterministic=True, **fields)

    alone = [engine().generate([request], strict=True)[0] for request in own]
    assert same_bits(engine().generate(own * 16, strict=True), alone * 16)
    assert same_bits(engine(max_batch_tokens=9).generate(own[::-1], strict=True), alone[::-1])
    scores = engine().score(alone)
    assert all(torch.equal(row, group.rollouts[0].logprobs) for group, (row,) in zip(alone, scores, strict=True))


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_plans_do_not_depend_on_the_batch(method, model_of, chat, picture, make_engine):
    """64 requests together, again, in another order and alone, in default mode: equal plans but for scores that are
    as good as equal at a cut.
    """
    config, cut = METHODS[method]
    model = model_of()
    pictures = [picture(56 + 28 * (seed % 5), 56 + 28 * (seed % 4), seed) for seed in range(20)]
    wanted = [chat("?", [pictures[i % 20], pictures[i * 7 % 20]], system=None, max_tokens=1) for i in range(64)]

    def plans(order: slice | list[int]) -> list[RolloutGroup]:
        own = wanted[order] if isinstance(order, slice) else [wanted[index] for index in order]
        return make_engine(model, prune=config, kv_memory=1 << 24).generate(own, strict=True)

    together, chosen = plans(slice(None)), range(0, 64, 13)
    same_sets = [kept_of(group.keep) for group in together]
    assert [kept_of(group.keep) for group in plans(slice(None))] == same_sets, "the same run again"
    pairs = [*zip(together, plans(slice(None, None, -1))[::-1], strict=True)]
    pairs += [(together[index], plans([index])[0]) for index in chosen]
    different = [group for group, other in pairs if kept_of(group.keep) != kept_of(other.keep)]
    assert len(different) < 3
    assert all(oracle_kept(model, group, cut)[1] <= MARGIN for group in different)
    for index in chosen:
        check(model, [together[index]], cut)


def test_a_batch_of_all_kinds(model_of, requests, make_engine):
    """Prompts without images, and some that are not pruned or pruned before the model, beside those pruned inside."""
    config, cut = METHODS["fastv"]
    model = model_of()
    free = [dataclasses.replace(request, prune=None) for request in requests()[:2]]
    engine = make_engine(model, prune=config)
    groups = engine.generate([*free, *requests()], strict=True)
    check(model, groups[2:], cut)
    assert [group.keep for group in groups[:2]] == [None, None]
    ahead = [dataclasses.replace(request, prune=PruneConfig("divprune", 0.3)) for request in requests()]
    assert close(engine.generate(ahead, strict=True), make_engine(model).generate(ahead, strict=True))
    assert worst(model, groups[:2]) < TOLERANCE
    assert worst(model, groups[:1], groups[2].keep) > 100 * TOLERANCE, "another policy"
    assert all(
        torch.allclose(row, rollout.logprobs, atol=TOLERANCE)
        for group, rows in zip(groups, engine.score(groups), strict=True)
        for row, rollout in zip(rows, group.rollouts, strict=True)
    )


def test_images_before_the_end_of_the_prefix(model_of, picture, make_engine):
    """The first segment holds an image, whose tokens the last token of the second one chooses."""
    config, cut = METHODS["pyramiddrop"]
    model = model_of()
    vision = [picture(112, 112, 5), picture(84, 140, 6)]
    engine = make_engine(model, prune=config, max_batch_tokens=10)
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    request = Request(f"See {text} now {text} what?", images=vision, n=2, sampling=SamplingParams(max_tokens=5, seed=1))
    for length in (0, 26, 2, 45):  # none, behind the first image, before it, behind both
        groups = engine.generate([dataclasses.replace(request, prefix_len=length)], strict=True)
        check(model, groups, cut)
        assert len(groups[0].segments) == 1 + (length > 0)


def test_a_prompt_that_ends_with_an_image(model_of, picture, make_engine):
    """The token that predicts the first one is kept, whatever it is paid."""
    config = PruneConfig("fastv", 0.1)
    model = model_of()
    request = Request(
        "See <|vision_start|><|image_pad|>", images=[picture(112, 112, 1)], sampling=SamplingParams(max_tokens=5)
    )
    (group,) = make_engine(model, prune=config).generate([request], strict=True)
    (kept,) = kept_of(group.keep)[0]
    assert len(kept) == 2
    assert kept[-1] == 15
    assert worst(model, [group]) < TOLERANCE
