"""Random lives of an engine: after each operation every page has one owner, and each request ends exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from foveate.rollout.config import SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, RolloutGroup, VisionInputs

NUM_PAGES = 16
PAGE = 4


class Broken(Exception):
    """What a step is made to raise."""


class Trace:
    """Drives one engine with random operations and keeps the book of what came in and what went out."""

    def __init__(self, engine: Engine, seed: int, images: list[VisionInputs], image_id: int | None):
        self.engine = engine
        self.random = random.Random(seed)
        self.images, self.image_id = images, image_id
        self.added: list[str] = []
        self.mine: set[str] = set()  # added by hand, not ended
        self.ended: Counter[str] = Counter()
        self.streams: list[Iterator[RolloutGroup]] = []
        self.breaks: dict[str, Callable[[], None]] = {}
        self.operations = {
            self.add: 6, self.step: 12, self.abort: 2, self.update: 1, self.refused: 1,
            self.break_step: 1, self.open_stream: 1, self.advance_stream: 3, self.abandon_stream: 1, self.generate: 1,
        }  # fmt: skip

    def run(self, count: int) -> None:
        operations = self.random.choices(list(self.operations), list(self.operations.values()), k=count)
        for operation in operations:
            operation()
            self.check()
        for stream in self.streams:
            stream.close()
        while self.engine.has_unfinished:
            self.step()
            self.check()
        assert set(self.ended.values()) <= {1}
        assert self.ended.keys() >= set(self.added), "each request ends exactly once"
        report, stats = self.engine.memory_report(), self.engine.stats()
        assert (report["kv_pages_used"], report["kv_used"], stats["running"], stats["waiting"]) == (0, 0, 0, 0)
        assert not self.engine._groups
        assert not self.engine._tree._by_identity

    def request(self) -> Request:
        """Short prompts of few kinds, so that beginnings are shared; some with an image."""
        draw = self.random
        start = draw.choice(([1, 2, 3, 4, 5], [7] * 9, []))
        ids = [*start, *[draw.randrange(3) for _ in range(draw.choice((1, 2, 12)))]]
        vision = None
        if self.images and draw.random() < 0.4:
            vision = draw.choice(self.images)
            ids += [self.image_id] * int(vision.image_grid_thw.prod() // 4) + [5]
        sampling = SamplingParams(
            max_tokens=draw.choice((1, 2, 7, 25)), seed=draw.randrange(3), temperature=draw.choice((0, 1.0))
        )
        n = draw.choice((1, 1, 2, 4))
        return Request(ids, vision=vision, n=n, sampling=sampling, prefix_len=draw.choice((None, len(start))))

    def add(self) -> None:
        name = self.engine.add_request(self.request())
        self.added.append(name)
        self.mine.add(name)

    def take(self, groups: list[RolloutGroup]) -> None:
        for group in groups:
            self.ended[group.request_id] += 1
            self.mine.discard(group.request_id)
            assert len(group.rollouts) == group.request.n
            for rollout in group.rollouts:
                count = len(rollout.token_ids)
                assert count == len(rollout.logprobs) <= group.request.sampling.max_tokens
                assert torch.isfinite(rollout.logprobs).all()
                assert rollout.finish_reason in ("stop", "length", "abort", "error")
                assert rollout.finish_reason != "length" or count == group.request.sampling.max_tokens

    def step(self) -> None:
        self.take(self.engine.step())

    def abort(self) -> None:
        running = sorted(self.mine & self.engine._groups.keys())
        if running:
            self.engine.abort(self.random.choice(running))

    def update(self) -> None:
        if self.engine._groups:
            with pytest.raises(ValueError, match="unfinished requests"):
                self.engine.update_weights()
        if self.random.random() < 0.5:
            self.engine.update_weights(in_flight="abort", vision_changed=self.random.random() < 0.5)

    def refused(self) -> None:
        before = self.engine.stats()
        for request in (Request([999_999]), Request([1] * (NUM_PAGES * PAGE + 1)), Request([])):
            with pytest.raises(ValueError, match="request "):
                self.engine.add_request(request)
        assert self.engine.stats() == before

    def break_step(self) -> None:
        """A forward that raises ends what runs; what waits goes on."""
        runner = self.engine._runner
        name = self.random.choice(("prefill", "first_tokens", "decode"))

        def fail(*_: object) -> None:
            raise Broken(name)

        setattr(runner, name, fail)
        running = {sequence.group.request_id for sequence in self.engine._scheduler.running}
        try:
            self.take(self.engine.step())
        except Broken:
            assert not self.engine._scheduler.running
            assert not running & self.engine._groups.keys()
        finally:
            delattr(runner, name)

    def open_stream(self) -> None:
        self.streams.append(self.engine.stream([self.request() for _ in range(self.random.randint(0, 3))]))

    def advance_stream(self) -> None:
        if self.streams:
            stream = self.random.choice(self.streams)
            if group := next(stream, None):
                assert group.request_id not in self.added
                self.take([group])

    def abandon_stream(self) -> None:
        if self.streams:
            self.streams.pop(self.random.randrange(len(self.streams))).close()

    def generate(self) -> None:
        requests = [self.request() for _ in range(self.random.randint(0, 2))]
        groups = self.engine.generate([*requests, Request([999_999])], progress=False)
        assert [group.request for group in groups[:-1]] == requests
        assert [group.error is None for group in groups] == [*(True for _ in requests), False]

    def check(self) -> None:
        """The pages in use are those of the segments that unfinished groups hold, each held as often as counted."""
        engine = self.engine
        held: Counter = Counter()
        for group in engine._groups.values():
            held.update(group.path)
            held.update(sequence.leaf for sequence in group.sequences if sequence.leaf is not None)
        segments = set(held)
        held.update(segment.parent for segment in segments if segment.parent is not None)
        assert {segment: segment.refs for segment in held} == dict(held)
        pages = [page for segment in segments for page in segment.pages]
        pool, report = engine._tree.pool, engine.memory_report()
        assert len(pages) == len(set(pages)) == report["kv_pages_used"]
        assert all(pool.is_used(page) for page in pages)
        assert report["kv_used"] == report["kv_capacity"] // report["kv_pages"] * len(pages)
        assert set(engine._tree._by_identity.values()) == {s for s in segments if s.identity is not None}
        unfinished = {s.group.request_id for s in engine._scheduler.running}
        unfinished |= {group.request_id for group in engine._scheduler.waiting}
        assert unfinished == engine._groups.keys()
        waiting = {group.request_id for group in engine._outbox}
        assert self.mine <= engine._groups.keys() | waiting, "no request is lost"
        stats = engine.stats()
        assert stats["finished"] + stats["failed"] + len(engine._groups) >= len(self.added)


@pytest.fixture(scope="module")
def models():
    return {family: tiny_model(family, num_hidden_layers=1) for family in ("llama", "qwen2_5_vl")}


@pytest.fixture
def trace(models, make_engine) -> Callable[[str, int], Trace]:
    """(family, seed) -> a trace on an engine of NUM_PAGES pages whose other limits are drawn."""

    def make(family: str, seed: int) -> Trace:
        draw, model = random.Random(seed), models[family]
        full = make_engine(model, page_size=PAGE).memory_report()
        engine = make_engine(
            model,
            page_size=PAGE,
            kv_memory=NUM_PAGES * full["kv_capacity"] // full["kv_pages"],
            max_batch_tokens=draw.choice((3, 10, 100)),
            max_sequences=draw.choice((4, 9, 100)),
            vision_cache_memory=draw.choice((0, 2000, 1 << 20)),
        )
        images = []
        if family == "qwen2_5_vl":
            grids = (torch.tensor([[1, 4, 4]]), torch.tensor([[1, 2, 6]]))
            images = [VisionInputs(torch.rand(int(grid.prod()), 1176), grid) for grid in grids]
        return Trace(engine, seed, images, getattr(model.config, "image_token_id", None))

    return make


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_operations(family, seed, trace):
    trace(family, seed).run(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_ten_thousand_random_operations(family, trace):
    life = trace(family, 1)
    life.run(10_000)
    stats = life.engine.stats()
    assert stats["preempted"] > 50
    assert stats["requests"] > 2_000


@pytest.mark.parametrize("name", ["prefill", "first_tokens", "decode"])
def test_after_a_broken_step_the_rest_goes_on(name, make_engine, monkeypatch):
    engine = make_engine("llama", max_sequences=2)
    names = [engine.add_request(Request([index] * 5, sampling=SamplingParams(max_tokens=5))) for index in range(4)]
    if name == "decode":
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, name, lambda *_: (_ for _ in ()).throw(Broken()))
        with pytest.raises(Broken):
            engine.step()
    groups = {}
    while engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    assert [groups[name].error is None for name in names] == [False, False, True, True]
