"""Prompts in chunks, a small pool, samples that lose their pages: the same tokens as undisturbed, and transformers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from foveate.rollout.config import PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.runner import Runner
from foveate.rollout.scheduler import Scheduler, Sequence
from foveate.rollout.testing import FAMILIES, tiny_model
from foveate.rollout.types import Request, RolloutGroup

TOLERANCE = 5e-5
# What happens: (fields of the configuration, pages of the pool or None for plenty)
PRESSURE = {
    "chunks": ({"max_batch_tokens": 13}, None),
    "one token a step": ({"max_batch_tokens": 1}, None),
    "tiny pool": ({}, 30),
    "chunks in a tiny pool": ({"max_batch_tokens": 13, "max_sequences": 7}, 30),
}


CASES = [
    pytest.param(family, pressure, marks=[] if both or family in ("llama", "qwen2_5_vl") else [pytest.mark.slow])
    for family in FAMILIES
    for pressure, both in zip(PRESSURE, (False, False, False, True), strict=True)
]


@pytest.fixture
def requests_of(chat, picture) -> Callable[..., list[Request]]:
    """(family, **sampling) -> prompts that share beginnings and images, several samples each."""

    def make(family: str, **sampling) -> list[Request]:
        sampling = {"max_tokens": 20, "ignore_eos": True, **sampling}
        pictures = [picture(56, 112, 1), picture(84, 84, 2)] if family.endswith("_vl") else []
        requests = [
            chat("Which of these is larger?", pictures, n=3, seed=1, **sampling),
            chat("And this one, where is it?", pictures[1:], n=2, seed=2, **sampling),
            Request("Plain text.", n=4, sampling=SamplingParams(seed=3, **sampling)),
            chat("Which of these is smaller?", pictures, n=2, seed=4, **sampling),
        ]
        return requests + [dataclasses.replace(request, n=1) for request in requests]

    return make


@pytest.fixture
def make_small(make_engine) -> Callable[..., Engine]:
    """(model, pages or None, **config): an engine whose pool has so many pages of 8 tokens."""

    def make(model, num_pages: int | None, **config) -> Engine:
        if num_pages is None:
            return make_engine(model, **config)
        full = make_engine(model).memory_report()
        return make_engine(model, kv_memory=num_pages * full["kv_capacity"] // full["kv_pages"], **config)

    return make


def assert_same(groups: list[RolloutGroup], expected: list[RolloutGroup]) -> None:
    for group, other in zip(groups, expected, strict=True):
        for rollout, twin in zip(group.rollouts, other.rollouts, strict=True):
            assert rollout.token_ids.tolist() == twin.token_ids.tolist()
            assert (rollout.text, rollout.finish_reason) == (twin.text, twin.finish_reason)
            for name in ("logprobs", "log_kept", "entropy"):
                ours, theirs = getattr(rollout, name), getattr(twin, name)
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def assert_empty(engine: Engine) -> None:
    assert engine.memory_report()["kv_pages_used"] == 0
    assert (engine.stats()["running"], engine.stats()["waiting"], engine.has_unfinished) == (0, 0, False)


@pytest.mark.parametrize(("family", "pressure"), CASES)
def test_pressure_changes_nothing(family, pressure, requests_of, make_engine, make_small, assert_logprobs):
    config, num_pages = PRESSURE[pressure]
    model = tiny_model(family, seed=5)
    requests = requests_of(family, temperature=1.1, top_p=0.95, stop=("ab", "xe"))
    engine, calm = make_small(model, num_pages, **config), make_engine(model)
    groups, expected = engine.generate(requests, strict=True), calm.generate(requests, strict=True)
    assert_same(groups, expected)
    assert_logprobs(model, groups)
    assert calm.stats()["preempted"] == 0
    assert (engine.stats()["preempted"] > 0) == (num_pages is not None)
    assert engine.stats()["steps"] > calm.stats()["steps"]
    assert_empty(engine)


@pytest.mark.parametrize(
    "pressure", [pytest.param(name, marks=[pytest.mark.slow] if "one" in name else []) for name in PRESSURE]
)
@pytest.mark.parametrize("prune", [PruneConfig("fastv", 0.3), PruneConfig("pyramiddrop", 0.6)], ids=lambda p: p.method)
def test_pressure_changes_nothing_between_pruned_layers(prune, pressure, requests_of, make_engine, make_small):
    """Plans too; a prompt whose pages were taken is computed again under its own."""
    config, num_pages = PRESSURE[pressure]
    model = tiny_model("qwen2_5_vl", seed=5, num_hidden_layers=4)
    requests = requests_of("qwen2_5_vl", temperature=1.1, top_p=0.95, stop=("ab", "xe"))
    engine, calm = make_small(model, num_pages, prune=prune, **config), make_engine(model, prune=prune)
    groups, expected = engine.generate(requests, strict=True), calm.generate(requests, strict=True)
    assert_same(groups, expected)
    for group, other in zip(groups, expected, strict=True):
        sites = group.keep.sites if group.keep else ()
        assert [site.kept.tolist() for site in sites] == [s.kept.tolist() for s in (other.keep.sites if sites else ())]
    assert (engine.stats()["preempted"] > 0) == (num_pages is not None)
    assert_empty(engine)


@pytest.mark.parametrize(("family", "pressure"), CASES)
def test_greedy_tokens_are_those_of_transformers(
    family, pressure, requests_of, make_small, assert_greedy, assert_logprobs, banned_by_default
):
    config, num_pages = PRESSURE[pressure]
    model = tiny_model(family, seed=6)
    engine = make_small(model, num_pages, **config)
    groups = engine.generate(requests_of(family, temperature=0), strict=True)
    assert_greedy(model, groups[:4], banned_by_default(engine))
    assert_logprobs(model, groups)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_running_samples_decode_between_the_chunks(family, chat, picture, make_engine):
    engine = make_engine(family, max_batch_tokens=20)
    images = [picture(84, 84)] if family == "qwen2_5_vl" else []
    first = Request("x", request_id="first", sampling=SamplingParams(max_tokens=9, ignore_eos=True))
    engine.add_request(first)
    engine.step()
    late = dataclasses.replace(chat("y" * 100, images, max_tokens=2, ignore_eos=True), request_id="late")
    engine.add_request(late)
    drawn, ended = [], []
    while engine.has_unfinished:
        drawn.append([len(s.token_ids) for s in engine._scheduler.running])
        ended += [group.request_id for group in engine.step()]
    chunks = -(-len(engine._processor.prepare(late).token_ids) // 20)
    assert drawn[: min(chunks, 8)] == [[1], *([2 + i, 0] for i in range(min(chunks, 8) - 1))]
    assert ended == ["first", "late"]


@pytest.mark.parametrize("cache", [0, 1 << 20])
@pytest.mark.parametrize("budget", [1, 3, 7, 30])
def test_images_cut_by_chunks(cache, budget, chat, picture, make_engine, assert_logprobs, monkeypatch):
    """Each image is encoded once, though its tokens come over many steps and no cache holds it; equal images too."""
    model = tiny_model("qwen2_5_vl", seed=8)
    one, two = picture(84, 112, 1), picture(84, 112, 2)
    requests = [chat("see", [one, two, one], n=2, max_tokens=4), chat("look", [two], max_tokens=4)]
    engine = make_engine(model, max_batch_tokens=budget, vision_cache_memory=cache)
    groups = engine.generate(requests[:1], strict=True)
    assert engine.stats()["images_encoded"] == 2
    assert_logprobs(model, groups)
    engine.add_request(requests[1])
    engine.step()
    held = []
    while engine.has_unfinished:
        held += [len(s.features) for group in engine._desk.groups.values() for s in group.path if not s.num_missing]
        engine.step()
    assert held
    assert not any(held), "features go with the last chunk that needs them"


def test_samples_of_a_request_larger_than_the_pool_take_turns(make_engine, make_small, assert_logprobs):
    """Two pages of prompt, six samples of up to four pages, and a pool of eight pages."""
    model = tiny_model("llama", seed=2)
    request = Request([3] * 16, n=6, sampling=SamplingParams(max_tokens=33, seed=1, ignore_eos=True))
    engine = make_small(model, 8)
    groups = engine.generate([request], strict=True)
    assert_same(groups, make_engine(model).generate([request]))
    assert engine.stats()["preempted"] >= 4
    assert_logprobs(model, groups)
    assert_empty(engine)


def test_first_come_first_served(make_small):
    """Groups of one kind end in the order they came, whoever lost pages on the way."""
    engine = make_small("qwen2", 30)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    names = [engine.add_request(Request(f"number {index}", n=3, sampling=sampling)) for index in range(12)]
    ended = []
    while engine.has_unfinished:
        ended += [group.request_id for group in engine.step()]
    assert ended == names
    assert engine.stats()["preempted"] > 0


def test_hundreds_of_groups(make_engine, make_small):
    model = tiny_model("llama", num_hidden_layers=1)
    prompts = [f"{index % 17} and {index}" for index in range(300)]
    requests = [
        Request(prompt, n=1 + index % 4, sampling=SamplingParams(max_tokens=1 + index % 23, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    engine = make_small(model, 90, max_batch_tokens=128)
    assert_same(engine.generate(requests, strict=True), make_engine(model).generate(requests, strict=True))
    assert engine.stats()["preempted"] > 0
    assert engine.stats()["finished"] == 300
    assert_empty(engine)


def test_a_request_that_can_never_fit_fails_alone(make_small):
    engine = make_small("llama", 4)
    good = Request([1] * 8, sampling=SamplingParams(max_tokens=20))
    large = Request([1] * 30, request_id="large", sampling=SamplingParams(max_tokens=20))
    groups = engine.generate([good, large, good])
    assert [group.error is None for group in groups] == [True, False, True]
    assert "request 'large': expected a request that fits into 4 pages" in str(groups[1].error)
    with pytest.raises(ValueError, match="request 'large': expected a request that fits into 4 pages"):
        engine.add_request(large)


def test_an_abort_of_a_preempted_sample(make_small):
    engine = make_small("llama", 8)
    sampling = SamplingParams(max_tokens=33, ignore_eos=True)
    old, young = (engine.add_request(Request([3 + i] * 8, n=2, sampling=sampling)) for i in range(2))
    while not engine.stats()["preempted"]:
        engine.step()
    engine.abort(young)
    groups = {group.request_id: group for group in engine.step()}
    assert {rollout.finish_reason for rollout in groups[young].rollouts} == {"abort"}
    assert all(1 < len(rollout.token_ids) < 33 for rollout in groups[young].rollouts)
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    assert {rollout.finish_reason for rollout in groups[old].rollouts} == {"length"}
    assert_empty(engine)


def _stored_late(self: Sequence):
    prompt = ORIGINAL_STORED(self)
    return prompt and dataclasses.replace(prompt, positions=prompt.positions + 1)


def _stored_changed(self: Sequence):
    prompt = ORIGINAL_STORED(self)
    return prompt and dataclasses.replace(prompt, token_ids=prompt.token_ids.flip(0))


def _forget_the_last(self: Scheduler, sequence: Sequence) -> None:
    ORIGINAL_DROP(self, sequence)
    del sequence.token_ids[-1:]


def _features_from_the_start(self: Runner, chunks):
    for chunk in chunks:
        chunk.segment.features = {key: value.flip(0) for key, value in chunk.segment.features.items()}
    return ORIGINAL_EMBED(self, chunks)


ORIGINAL_STORED, ORIGINAL_DROP, ORIGINAL_EMBED = Sequence.stored, Scheduler._drop_leaf, Runner._embed
FAULTS = {
    "recomputed one position late": (Sequence, "stored", _stored_late),
    "recomputed in another order": (Sequence, "stored", _stored_changed),
    "the last token forgotten": (Scheduler, "_drop_leaf", _forget_the_last),
    "features held are not those of the image": (Runner, "_embed", _features_from_the_start),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault, requests_of, make_engine, make_small, monkeypatch):
    model = tiny_model("qwen2_5_vl", seed=5)
    requests = requests_of("qwen2_5_vl", temperature=1.1)
    expected = make_engine(model).generate(requests, strict=True)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_same(make_small(model, 40, max_batch_tokens=13).generate(requests, strict=True), expected)
