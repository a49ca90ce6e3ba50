"""Random lives of an engine: after each operation every page has one owner, and each request ends exactly once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from foveate.rollout.config import PruneConfig, SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.scheduler import Group
from foveate.rollout.segments import Segment
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, Rollout, RolloutGroup, VisionInputs

NUM_PAGES = 16  # of all layers
PAGE = 4
# What a trace runs on: (family, layers, pruning, blocks of layers that have pages of their own)
KINDS = {
    "llama": ("llama", 1, None, 1),
    "qwen2_5_vl": ("qwen2_5_vl", 1, None, 1),
    "fastv": ("qwen2_5_vl", 2, PruneConfig("fastv", 0.3, layer=1), 2),
    "pyramiddrop": ("qwen2_5_vl", 3, PruneConfig("pyramiddrop", 0.5, layers=(1, 2)), 3),
}
SEEDS = (1, 2, 3, 4, 5)  # of the long traces
FLOAT = 4  # bytes


class Broken(Exception):
    """What a step is made to raise."""


class Trace:
    """Drives one engine with random operations and keeps the book of what came in and what went out."""

    def __init__(self, engine: Engine, seed: int, images: list[VisionInputs], image_id: int | None, num_blocks: int):
        self.engine, self.num_pages = engine, NUM_PAGES * num_blocks
        self.random = random.Random(seed)
        self.images, self.image_id = images, image_id
        self.added: list[str] = []
        self.mine: set[str] = set()  # added by hand, not ended
        self.ended: Counter[str] = Counter()
        self.streams: list[Iterator[RolloutGroup]] = []
        self.drawn: dict[str, list[list[tuple[int, int]]]] = {}  # tokens of each sample at each update, its version
        self.ended_under: dict[str, int] = {}  # version of the weights when they ended
        self.finish, engine._desk._finish = engine._desk._finish, self.note_ended
        self.num_mixed = 0  # rollouts of more than one version
        self.operations = {
            self.add: 6, self.step: 12, self.abort: 2, self.update: 1, self.bad_update: 1, self.torn_update: 1,
            self.refused: 1, self.break_step: 1, self.open_stream: 1, self.advance_stream: 3, self.abandon_stream: 1,
            self.generate: 1,
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
        stats = self.engine.stats()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        assert not self.engine._desk.groups
        assert not self.engine._tree._by_identity
        self.check_report()

    def check_report(self) -> None:
        """At the end all pages are free, and the cache has what its budget allows."""
        engine, report = self.engine, self.engine.memory_report()
        text = engine.model.config.get_text_config()
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        decoder = {id(p): p.nbytes for name, p in engine.model.named_parameters() if "visual" not in name}
        cached = self.cached_bytes()
        assert cached <= engine.config.vision_cache_memory
        assert report == {
            "kv_capacity": NUM_PAGES * PAGE * token * FLOAT, "kv_used": 0,
            "kv_pages": self.num_pages, "kv_pages_used": 0,
            "held_hidden": 0, "vision_cache": cached, "shadow_weights": 0, "shared_weights": sum(decoder.values()),
        }  # fmt: skip

    def cached_bytes(self) -> int:
        """Bytes of the features in the cache, by the images' sizes."""
        vision = self.engine._runner.vision
        sizes = {int(i.image_grid_thw.prod()) // 4 * self.engine.spec.hidden_size * FLOAT for i in self.images}
        cached = [entry.features.nbytes for entry in vision._entries.values()] if vision else []
        assert set(cached) <= sizes
        assert len(cached) <= len(self.images)
        return sum(cached)

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
            last = self.ended_under.pop(group.request_id)
            marks = self.drawn.pop(group.request_id, [[] for _ in group.rollouts])
            for rollout, before in zip(group.rollouts, marks, strict=True):
                count = len(rollout.token_ids)
                self.check_versions(rollout, [*before, (count, last)])
                assert count == len(rollout.logprobs) <= group.request.sampling.max_tokens
                assert torch.isfinite(rollout.logprobs).all()
                assert rollout.finish_reason in ("stop", "length", "abort", "error")
                assert rollout.finish_reason != "length" or count == group.request.sampling.max_tokens

    def step(self) -> None:
        self.take(self.engine.step())

    def abort(self) -> None:
        running = sorted(self.mine & self.engine._desk.groups.keys())
        if running:
            self.engine.abort(self.random.choice(running))

    def check_versions(self, rollout: Rollout, found: list[tuple[int, int]]) -> None:
        """The spans are those of the tokens that each update found. found: (tokens, version) there and at the end."""
        start, expected = 0, []
        for end, version in found if rollout.finish_reason != "error" else ():
            expected += [(start, end, version)] if end > start else []
            start = end
        assert rollout.weight_versions == tuple(expected)
        self.num_mixed += len(expected) > 1

    def note_ended(self, group: Group) -> RolloutGroup:
        """Streams and the engine may hold a group that ended until after the next update."""
        self.ended_under[group.request_id] = self.engine.weight_version
        return self.finish(group)

    def weights(self) -> dict[str, torch.Tensor]:
        """New ones, not far from the old ones."""
        names = self.engine.model.state_dict()
        return {name: tensor * self.random.uniform(0.99, 1.01) for name, tensor in names.items()}

    def change(self, in_flight: str, **more: object) -> None:
        """A complete update, by any way, of a kind of its own for unfinished requests."""
        engine, new = self.engine, self.weights()
        manifest = {name: (tensor.shape, tensor.dtype) for name, tensor in new.items()}
        named, manifest = self.random.choice(
            [((), None), (new, None), (list(new.items()), manifest), (iter(new.items()), None)]
            + [(iter(new.items()), manifest)] * 2
        )
        drawn = {name: [len(s.token_ids) for s in group.sequences] for name, group in engine._desk.groups.items()}
        versions = engine.weight_version, engine.vision_version
        engine.update_weights(named, manifest=manifest, in_flight=in_flight, **more)
        assert engine.weight_version == versions[0] + 1
        assert engine._desk.groups.keys() == (drawn.keys() if in_flight == "keep" else set())
        for name in engine._desk.groups:
            marks = self.drawn.setdefault(name, [[] for _ in drawn[name]])
            for mark, count in zip(marks, drawn[name], strict=True):
                mark.append((count, versions[0]))
        if engine.vision_version > versions[1]:
            assert engine.memory_report()["vision_cache"] == 0

    def update(self) -> None:
        if self.engine._desk.groups:
            with pytest.raises(ValueError, match="unfinished requests"):
                self.engine.update_weights()
        self.change(self.random.choice(("abort", "keep", "keep")), vision_changed=self.random.choice((None, True)))

    def bad_update(self) -> None:
        """What is checked whole changes nothing when it is refused."""
        before, new = self.engine.stats(), self.weights()
        manifest = {name: (tensor.shape, tensor.dtype) for name, tensor in new.items()}
        new.popitem()
        for named, promised in ((new, None), (list(new.items()), manifest), (iter(new.items()), {**manifest, "x": ()})):
            with pytest.raises(ValueError, match="expected"):
                self.engine.update_weights(named, manifest=promised, in_flight="abort")
        assert self.engine.stats() == before

    def torn_update(self) -> None:
        """A stream that breaks off: nothing runs until a complete update, and nothing is lost."""
        engine, new = self.engine, list(self.weights().items())
        in_flight = self.random.choice(("abort", "keep"))
        before, version = set(engine._desk.groups), engine.weight_version
        manifest = {name: (tensor.shape, tensor.dtype) for name, tensor in new} if self.random.random() < 0.5 else None
        with pytest.raises(ValueError, match="missing"):
            engine.update_weights(iter(new[: self.random.randrange(len(new))]), manifest=manifest, in_flight=in_flight)
        assert (set(engine._desk.groups), engine.weight_version) == (before if in_flight == "keep" else set(), version)
        if self.random.random() < 0.5:
            self.add()
        for refused in (engine.step, lambda: engine.generate([self.request()], progress=False)):
            with pytest.raises(ValueError, match="expected a complete update_weights"):
                refused()
        if self.random.random() < 0.5:
            self.abort()
        self.check()
        self.change("keep")

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
            assert not running & self.engine._desk.groups.keys()
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
        for group in engine._desk.groups.values():
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
        self.check_tails(segments)
        assert set(engine._tree._by_identity.values()) == {s for s in segments if s.identity is not None}
        unfinished = {s.group.request_id for s in engine._scheduler.running}
        unfinished |= {group.request_id for group in engine._scheduler.waiting}
        assert unfinished == engine._desk.groups.keys()
        waiting = set(engine._desk._outbox)
        assert self.mine <= engine._desk.groups.keys() | waiting, "no request is lost"
        features = {key: f for segment in segments for key, f in segment.features.items()}
        cached = {key: entry.features for key, entry in engine._runner.vision._entries.items()} if features else {}
        assert all(f.data_ptr() == cached[key].data_ptr() for key, f in features.items()), "no byte is held uncounted"
        held_bytes = sum(feature.nbytes for feature in features.values())
        assert report["vision_cache"] == self.cached_bytes() <= max(engine.config.vision_cache_memory, held_bytes)
        stats = engine.stats()
        assert stats["finished"] + stats["failed"] + len(engine._desk.groups) >= len(self.added)

    def check_tails(self, segments: set[Segment]) -> None:
        """Pages of later layers are those of what is kept; what waits for a last token is counted, and nothing else."""
        for segment in segments:
            length = segment.span[1] - segment.span[0]
            if segment.identity is not None:
                held = segment.held or (length,) * len(segment.tables)  # each group has one block here
                assert [table.shape for table in segment.tables] == [(1, -(-count // PAGE)) for count in held]
                assert held[0] == length
            assert len({segment.stored(group) for group in range(len(segment.tables))}) == 1 or segment.tail
        tails = {segment.tail for segment in segments if segment.tail}
        rows = sum(len(part) for tail in tails for part in tail.held)
        assert self.engine.memory_report()["held_hidden"] == rows * self.engine.spec.hidden_size * FLOAT
        waiting = {s for s in segments if s.tail and not s.tail.is_complete}
        assert rows == sum(segment.length for segment in waiting)


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model(family, num_hidden_layers=layers) for kind, (family, layers, _, _) in KINDS.items()}


@pytest.fixture
def trace(models, make_engine) -> Callable[[str, int], Trace]:
    """(kind, seed) -> a trace on an engine of NUM_PAGES pages whose other limits are drawn."""

    def make(kind: str, seed: int) -> Trace:
        draw, model = random.Random(seed), models[kind]
        family, _, prune, num_blocks = KINDS[kind]
        full = make_engine(model, page_size=PAGE).memory_report()
        engine = make_engine(
            model,
            page_size=PAGE,
            prune=prune,
            kv_memory=NUM_PAGES * full["kv_capacity"] // full["kv_pages"],
            max_batch_tokens=draw.choice((3, 10, 100)),
            max_sequences=draw.choice((4, 9, 100)),
            vision_cache_memory=draw.choice((0, 2000, 1 << 20)),
        )
        images = []
        if family == "qwen2_5_vl":
            grids = (torch.tensor([[1, 4, 4]]), torch.tensor([[1, 2, 6]]))
            images = [VisionInputs(torch.rand(int(grid.prod()), 1176), grid) for grid in grids]
        return Trace(engine, seed, images, getattr(model.config, "image_token_id", None), num_blocks)

    return make


@pytest.mark.parametrize("kind", [*list(KINDS)[:3], pytest.param("pyramiddrop", marks=pytest.mark.slow)])
@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_operations(kind, seed, trace):
    trace(kind, seed).run(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_random_operations(kind, trace):
    lives = [trace(kind, seed) for seed in SEEDS]
    for life in lives:
        life.run(10_000 // len(SEEDS))
    totals = {name: sum(life.engine.stats()[name] for life in lives) for name in lives[0].engine.stats()}
    assert totals["preempted"] > 50
    assert totals["requests"] > 2_000
    assert totals["weight_version"] > 500
    assert sum(life.num_mixed for life in lives) > 100


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
