"""Whole schedules of random groups: every page is there when it is needed, and all are back in the end."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.pages import PagePool
from foveate.rollout.processor import Prompt
from foveate.rollout.scheduler import Batch, Group, Scheduler, Sequence
from foveate.rollout.segments import SegmentTree
from foveate.rollout.types import Request

NO_BANS = torch.zeros(0, dtype=torch.bool)
VERSIONS = (0, 0)


def group_of(name: str, lengths: list[int], n: int, max_tokens: int, token: int = 0) -> Group:
    """A group whose prompt has segments of these lengths, all of one token id."""
    total = sum(lengths)
    ends = tuple(torch.tensor(lengths).cumsum(0).tolist())
    prompt = Prompt(torch.full((total,), token), torch.arange(total).expand(3, -1), total, (), ends)
    request = Request([token], n=n, sampling=SamplingParams(max_tokens=max_tokens))
    group = Group(request, name, prompt, max_tokens, frozenset(), NO_BANS, NO_BANS)
    group.sequences = [Sequence(group, seed=index) for index in range(n)]
    return group


def scheduler_of(num_pages: int, page_size: int = 2, **config: int) -> Scheduler:
    return Scheduler(EngineConfig(page_size=page_size, **config), SegmentTree(PagePool(num_pages), page_size))


def pages(tokens: int, page_size: int) -> int:
    return (tokens + page_size - 1) // page_size


def lengths_of(group: Group) -> list[int]:
    return [stop - start for start, stop in zip((0, *group.prompt.boundaries), group.prompt.boundaries, strict=False)]


def paths_of(group: Group) -> list[tuple[int, ...]]:
    """What tells one prompt segment from another here: the token id, and where it and those above it end."""
    prompt = group.prompt
    return [(int(prompt.token_ids[0]), *prompt.boundaries[: index + 1]) for index in range(len(prompt.boundaries))]


def least_pages(group: Group, page_size: int) -> int:
    """What it takes to run: the prompt, and a first page for each sample or all pages of one."""
    fed = group.max_tokens - 1
    first = len(group.sequences) * pages(min(fed, 1), page_size)
    return sum(pages(length, page_size) for length in lengths_of(group)) + max(first, pages(fed, page_size))


class Driver:
    """Stands for engine and runner: stores tokens, draws them, stops samples at random, and keeps a book."""

    def __init__(self, scheduler: Scheduler, seed: int = 0, stop_chance: float = 0.0):
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.stop_chance = stop_chance
        self.unfinished: list[Group] = []  # in order of arrival
        self.seen: set[Group] = set()  # admitted at some time
        self.ended: list[Group] = []

    def add(self, *groups: Group) -> None:
        for group in groups:
            self.scheduler.add(group)
            self.unfinished.append(group)

    @property
    def order(self) -> list[Sequence]:
        return [s for group in self.unfinished for s in group.sequences if s.finish_reason is None]

    @property
    def size(self) -> int:
        return self.scheduler.tree.page_size

    def step(self) -> Batch:
        free, preempted = self.scheduler.tree.pool.num_free, self.scheduler.num_preempted
        before = [s for s in self.order if s.leaf is not None]
        ready = [s for s in before if s.token_ids and is_stored(s)]
        needed = sum(s.leaf.length == len(s.leaf.pages) * self.size for s in ready)
        batch = self.scheduler.next(VERSIONS)
        running = [s for s in self.order if s.leaf is not None]
        assert running == self.scheduler.running == self.order[: len(running)], "who runs is a beginning of the order"
        assert running[:1] == self.order[:1], "the oldest goes on"
        assert len(running) <= self.scheduler.config.max_sequences
        assert batch.decodes == [s for s in ready if s.leaf is not None]
        assert self.scheduler.num_preempted == preempted or needed > free, "nothing is taken without need"
        self.check_pages()
        self.check_leaves(running)
        self.store(batch, running)
        self.check_waiting(batch, running)
        for sequence in (*batch.decodes, *batch.firsts):
            self.draw(sequence)
        self.retire()
        return batch

    def store(self, batch: Batch, running: list[Sequence]) -> None:
        for sequence in batch.decodes:
            leaf = sequence.leaf
            assert leaf.length == len(sequence.token_ids) - 1 < len(leaf.pages) * self.size
            leaf.length += 1
        for segment, start, stop in batch.chunks:
            assert segment.length == start < stop <= segment.span[1] - segment.span[0] <= len(segment.pages) * self.size
            assert segment.parent is None or not segment.parent.num_missing, "parents go before children"
            segment.length = stop
        assert sum(stop - start for _, start, stop in batch.chunks) <= self.scheduler.config.max_batch_tokens
        assert batch.firsts == [s for s in running if not s.token_ids and is_stored(s)]

    def check_waiting(self, batch: Batch, running: list[Sequence]) -> None:
        """The budget is used up, or all that runs is stored and the first that waits has a reason."""
        config, tree = self.scheduler.config, self.scheduler.tree
        if sum(stop - start for _, start, stop in batch.chunks) == config.max_batch_tokens:
            return
        assert all(map(is_stored, set(running) - set(batch.decodes)))
        waiting = self.order[len(running) :]
        if not waiting:
            return
        group = waiting[0].group
        fresh = group not in self.seen
        samples = [s for s in waiting if s.group is group] if fresh else waiting[:1]
        held = {path for g in self.unfinished if g.path for path in paths_of(g)}
        lengths = zip(paths_of(group), lengths_of(group), strict=True)
        wanted = sum(pages(length, tree.page_size) for path, length in lengths if path not in held)
        wanted += sum(pages(min(max(len(s.token_ids), 1), group.max_tokens - 1), tree.page_size) for s in samples)
        wanted += 0 if fresh else len(running)
        assert wanted > tree.pool.num_free or len(running) + len(samples) > config.max_sequences

    def check_pages(self) -> None:
        """Pages in use are those of the segments that groups and samples hold."""
        self.seen |= {group for group in self.unfinished if group.path}
        held = {segment for group in self.unfinished for segment in group.path}
        held |= {s.leaf for group in self.unfinished for s in group.sequences if s.leaf is not None}
        used = [page for segment in held for page in segment.pages]
        assert len(used) == len(set(used)) == self.scheduler.tree.pool.num_used

    def check_leaves(self, running: list[Sequence]) -> None:
        for sequence in running:
            leaf, stored = sequence.leaf, max(len(sequence.token_ids) - 1, 0)
            assert leaf.parent is sequence.group.path[-1]
            assert len(leaf.pages) == pages(min(stored + 1, sequence.group.max_tokens - 1), self.size)
            if leaf.prompt is not None:  # its pages were taken once
                count = leaf.span[1]
                assert leaf.source.token_ids.tolist() == sequence.token_ids[:count]
                assert (
                    leaf.source.positions.tolist()
                    == [[sequence.group.prompt.next_position + i for i in range(count)]] * 3
                )

    def draw(self, sequence: Sequence) -> None:
        sequence.token_ids.append(self.random.randrange(100))
        if len(sequence.token_ids) == sequence.group.max_tokens:
            sequence.finish_reason = "length"
        elif self.random.random() < self.stop_chance:
            sequence.finish_reason = "stop"

    def retire(self) -> None:
        expected = [group for group in self.unfinished if all(s.finish_reason for s in group.sequences)]
        ended = self.scheduler.retire()
        assert sorted(map(id, ended)) == sorted(map(id, expected)), "each group ends once, with its last sample"
        self.leave(ended)
        self.check_pages()

    def leave(self, groups: list[Group]) -> None:
        self.unfinished = [group for group in self.unfinished if group not in groups]
        self.ended += groups
        assert all(not group.path and all(s.leaf is None for s in group.sequences) for group in groups)

    def abort(self, group: Group) -> None:
        for sequence in group.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"
        if self.scheduler.remove(group):
            self.leave([group])
        self.retire()

    def finish(self, limit: int = 5000) -> None:
        for _ in range(limit):  # far more than the tokens of all groups, each computed a few times
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.unfinished
        assert not self.scheduler.has_unfinished
        assert self.scheduler.tree.pool.num_used == 0


def is_stored(sequence: Sequence) -> bool:
    """Whether the prompt and all drawn tokens but the last have their keys."""
    path = sequence.group.path
    prompt = bool(path) and [segment.length for segment in path] == lengths_of(sequence.group)
    return prompt and sequence.leaf is not None and sequence.leaf.length == max(len(sequence.token_ids) - 1, 0)


@settings(max_examples=150, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 3, 8]),
    num_pages=st.integers(1, 40),
    max_sequences=st.sampled_from([1, 2, 5, 100]),
    max_batch_tokens=st.sampled_from([1, 3, 6, 12, 100]),
    stop_chance=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_schedule(page_size, num_pages, max_sequences, max_batch_tokens, stop_chance, seed):
    """Groups come while others run; prompts share beginnings; samples stop early; some are aborted at any time."""
    scheduler = scheduler_of(num_pages, page_size, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    driver = Driver(scheduler, seed, stop_chance)
    draw = driver.random
    accepted = []
    for index in range(16):
        lengths = [draw.choice((1, 2, 3, 5)) for _ in range(draw.choice((1, 2, 2, 3)))]
        max_tokens = draw.choice((1, 2, 3, 9, 20))
        group = group_of(str(index), lengths, draw.choice((1, 2, 4)), max_tokens, draw.choice((0, 0, 1)))
        if len(group.sequences) > max_sequences or least_pages(group, page_size) > num_pages:
            with pytest.raises(ValueError, match="expected"):
                driver.add(group)
            continue
        driver.add(group)
        accepted.append(group)
        for _ in range(draw.choice((0, 0, 1, 3, 9))):
            if driver.unfinished:
                driver.step()
        if driver.unfinished and draw.random() < 0.3:
            driver.abort(draw.choice(driver.unfinished))
    driver.finish()
    assert sorted(map(id, driver.ended)) == sorted(map(id, accepted))
    drawn = [s for group in driver.ended for s in group.sequences if s.finish_reason != "abort"]
    assert all(1 <= len(s.token_ids) <= s.group.max_tokens for s in drawn)


def spans_of(batch: Batch) -> list[tuple[int, int]]:
    return [(start, stop) for _, start, stop in batch.chunks]


def groups_of(sequences: list[Sequence]) -> list[Group]:
    return list(dict.fromkeys(sequence.group for sequence in sequences))


def test_prompts_fill_the_token_budget_while_others_decode():
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    groups = [group_of(str(token), [4], 2, 4, token) for token in range(5)]
    driver.add(*groups)
    first, second = driver.step(), driver.step()
    assert (spans_of(first), groups_of(first.firsts), first.decodes) == ([(0, 4), (0, 4), (0, 2)], groups[:2], [])
    assert (spans_of(second), groups_of(second.firsts)) == ([(2, 4), (0, 4), (0, 4)], groups[2:])
    assert second.decodes == [sequence for group in groups[:2] for sequence in group.sequences]
    third = driver.step()
    assert (third.chunks, third.firsts) == ([], [])
    assert third.decodes == [sequence for group in groups for sequence in group.sequences]


def test_prompts_that_are_found_cost_no_budget():
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    groups = [group_of(str(index), [8], 1, 2) for index in range(3)]
    driver.add(*groups)
    batch = driver.step()
    assert spans_of(batch) == [(0, 8)]
    assert groups_of(batch.firsts) == groups


def test_a_prompt_longer_than_the_budget_goes_in_chunks():
    """What runs decodes in between, and what comes later gets the rest of the budget of the last step."""
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    running, long, short = group_of("", [1], 1, 9), group_of("", [5, 20], 1, 2, 1), group_of("", [1], 1, 2, 2)
    driver.add(running)
    driver.step()
    driver.add(long, short)
    batches = [driver.step() for _ in range(3)]
    assert [spans_of(batch) for batch in batches] == [[(0, 5), (0, 5)], [(5, 15)], [(15, 20), (0, 1)]]
    assert [groups_of(batch.firsts) for batch in batches] == [[], [], [long, short]]
    assert all(batch.decodes == running.sequences for batch in batches)


def test_a_shared_prefix_outlives_the_group_that_began_it():
    """The first of two groups is aborted half-way through the prefix; the other one goes on from there."""
    driver = Driver(scheduler_of(100, max_batch_tokens=4))
    groups = [group_of(str(length), [10, length], 1, 2) for length in (3, 1)]
    driver.add(*groups)
    driver.step()
    batch = driver.step()
    assert spans_of(batch) == [(4, 8)]
    driver.scheduler.config = EngineConfig(page_size=2, max_batch_tokens=11)
    assert spans_of(driver.step()) == [(8, 10), (0, 3), (0, 1)]
    driver.finish()


def test_nobody_overtakes():
    """A small group behind one that does not fit yet waits with it."""
    driver = Driver(scheduler_of(4))
    first, large, small = (group_of(name, [2], n, 4, token=n) for name, n in (("first", 1), ("large", 2), ("small", 1)))
    driver.add(first, large, small)
    assert groups_of(driver.step().firsts) == [first], "it holds 2 of 4 pages, the next one needs 3"
    assert list(driver.scheduler.waiting) == [large, small]
    assert driver.step().decodes == first.sequences


def test_a_shared_prefix_is_paid_once():
    """Two groups of 4 prompt and 2 first pages run in 8 pages, because 4 are the same."""
    driver = Driver(scheduler_of(8))
    groups = [group_of(str(index), [8], 2, 3) for index in range(2)]
    driver.add(*groups)
    assert groups_of(driver.step().firsts) == groups
    assert driver.scheduler.tree.pool.num_used == 8


def test_other_weights_share_nothing():
    scheduler = scheduler_of(20)
    groups = [group_of(str(index), [8], 1, 3) for index in range(2)]
    for versions, group in enumerate(groups):
        scheduler.add(group)
        scheduler.next((versions, 0))
    assert scheduler.tree.num_shared == 0
    assert scheduler.tree.pool.num_used == 10


@pytest.mark.parametrize(("n", "max_tokens", "needed"), [(2, 6, 6), (4, 6, 7), (2, 1, 3), (1, 16, 11)])
def test_a_request_that_cannot_fit_is_refused(n, max_tokens, needed):
    """Segments of 3 and 1 tokens take 2 + 1 pages of 2; then a page a sample, or all of one sample."""
    driver = Driver(scheduler_of(needed))
    driver.add(group_of("", [3, 1], n, max_tokens))
    driver.finish()
    scheduler = scheduler_of(needed - 1)
    with pytest.raises(ValueError, match=rf"{needed - 1} pages of 2 tokens .* got one of {needed} pages \(kv_memory\)"):
        scheduler.add(group_of("", [3, 1], n, max_tokens))
    assert not scheduler.has_unfinished


def test_more_samples_than_the_engine_runs_are_refused():
    with pytest.raises(ValueError, match=r"expected n <= max_sequences = 3, got 4 \(n\)"):
        scheduler_of(100, max_sequences=3).add(group_of("", [1], 4, 1))


def test_one_token_needs_no_page_of_its_own():
    """The token that is drawn last is never fed."""
    driver = Driver(scheduler_of(1))
    driver.add(group_of("", [2], 3, 1))
    driver.step()
    assert [len(s.token_ids) for s in driver.ended[0].sequences] == [1, 1, 1]
    driver.finish()


def test_the_youngest_gives_up_its_pages():
    """Pages of 2: two groups of a prompt page and two samples each. The fourth token of the first makes room."""
    driver = Driver(scheduler_of(7))
    old, young = (group_of(str(token), [2], 2, 9, token) for token in range(2))
    driver.add(old, young)
    for _ in range(3):
        driver.step()
    assert driver.scheduler.tree.pool.num_used == 6
    assert driver.scheduler.running == [*old.sequences, *young.sequences]
    batch = driver.step()
    assert batch.decodes == old.sequences, "one free page, and two of the young samples and their prompt"
    assert (driver.scheduler.num_preempted, list(driver.scheduler.waiting)) == (2, [young])
    assert young.path == []
    assert [len(s.token_ids) for s in young.sequences] == [3, 3]
    kept = [list(s.token_ids) for s in young.sequences]
    while not old.is_finished:
        driver.step()
    batch = driver.step()
    assert spans_of(batch) == [(0, 2), (0, 2), (0, 2)], "the prompt, and what each sample had stored"
    assert batch.firsts == []
    assert [s.token_ids for s in young.sequences] == kept
    assert driver.step().decodes == young.sequences
    driver.finish()


def test_samples_of_one_group_take_turns():
    """Four samples of which one alone fits at its full length: each ends, the first ones first."""
    driver = Driver(scheduler_of(7))
    group = group_of("", [2], 4, 12)
    driver.add(group)
    ended: list[Sequence] = []
    while driver.unfinished:
        driver.step()
        ended += [s for s in group.sequences if s.finish_reason and s not in ended]
    assert ended == group.sequences
    assert driver.scheduler.num_preempted >= 3


@pytest.mark.parametrize("num_pages", [12, 60, 200])
def test_hundreds_of_groups_in_flight(num_pages):
    driver = Driver(scheduler_of(num_pages, 4, max_sequences=256, max_batch_tokens=64), seed=3, stop_chance=0.05)
    for index in range(300):
        driver.add(group_of(str(index), [4, 1 + index % 9], 1 + index % 4, 1 + index % 30, token=index % 7))
    driver.finish(20_000)
    assert len(driver.ended) == 300
    assert driver.scheduler.num_preempted > 0


def test_an_empty_scheduler():
    scheduler = scheduler_of(1)
    batch = scheduler.next(VERSIONS)
    assert (batch.chunks, batch.decodes, batch.firsts) == ([], [], [])
    assert (scheduler.retire(), scheduler.has_unfinished) == ([], False)
