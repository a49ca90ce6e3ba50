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
from foveate.rollout.scheduler import Group, Scheduler, Sequence
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


def pages_alone(group: Group, page_size: int) -> int:
    """Prompt, and each sample up to the token before its last, whose keys nobody needs."""
    samples = len(group.sequences) * pages(group.max_tokens - 1, page_size)
    return sum(pages(length, page_size) for length in lengths_of(group)) + samples


class Driver:
    """Stands for engine and runner: stores tokens, draws them, and stops samples early at random."""

    def __init__(self, scheduler: Scheduler, seed: int = 0, stop_chance: float = 0.0):
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.stop_chance = stop_chance
        self.queue: list[Group] = []  # waiting, by our own book
        self.running: list[Group] = []
        self.ended: list[Group] = []

    def add(self, group: Group) -> None:
        self.scheduler.add(group)
        self.queue.append(group)

    def step(self) -> None:
        batch = self.scheduler.next(VERSIONS)
        idle = not self.running
        assert batch.groups == self.queue[: len(batch.groups)], "first come, first served"
        self.check_admission(batch.groups, idle)
        self.queue = self.queue[len(batch.groups) :]
        self.running += batch.groups
        if batch.groups:
            assert not batch.sequences
            self.prefill(batch.groups)
            self.draw([sequence for group in batch.groups for sequence in group.sequences])
        else:
            expected = [s for group in self.running for s in group.sequences if s.finish_reason is None]
            assert sorted(map(id, batch.sequences)) == sorted(map(id, expected))
            for sequence in batch.sequences:
                self.scheduler.grow(sequence)  # raises OutOfPages if the admission was wrong
                sequence.leaf.length += 1
                assert sequence.leaf.length == len(sequence.token_ids)
            self.draw(batch.sequences)
        self.retire()
        self.check_promises()

    def prefill(self, groups: list[Group]) -> None:
        new = {segment: None for group in groups for segment in group.path if segment.length == 0}
        budget = self.scheduler.config.max_batch_tokens
        tokens = 0
        for segment in new:
            segment.length = segment.span[1] - segment.span[0]
            tokens += segment.length
        assert tokens <= budget or len({id(segment.prompt) for segment in new}) == 1
        for group in groups:
            assert [segment.length for segment in group.path] == lengths_of(group)
            assert all(sequence.leaf.parent is group.path[-1] for sequence in group.sequences)

    def draw(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == sequence.group.max_tokens:
                sequence.finish_reason = "length"
            elif self.random.random() < self.stop_chance:
                sequence.finish_reason = "stop"

    def retire(self) -> None:
        expected = [group for group in self.running if all(s.finish_reason for s in group.sequences)]
        ended = self.scheduler.retire()
        assert sorted(map(id, ended)) == sorted(map(id, expected)), "each group ends once, with its last sample"
        self.running = [group for group in self.running if group not in ended]
        self.ended += ended
        assert all(not group.path and all(s.leaf is None for s in group.sequences) for group in ended)

    def check_admission(self, admitted: list[Group], idle: bool) -> None:
        """No limit is broken, and whoever waits has a reason."""
        config, tree = self.scheduler.config, self.scheduler.tree
        active = [s for group in self.running for s in group.sequences if s.finish_reason is None]
        samples = len(active) + sum(len(group.sequences) for group in admitted)
        assert samples == len(self.scheduler.running) <= config.max_sequences
        if len(admitted) == len(self.queue):
            return
        head = self.queue[len(admitted)]
        assert admitted or not idle, "a request that fits alone runs when nothing else does"
        free = tree.pool.num_free - self.promised([*self.running, *admitted])
        held = {path for group in (*self.running, *admitted) for path in paths_of(group)}
        lengths = zip(paths_of(head), lengths_of(head), strict=True)
        shared = sum(pages(length, tree.page_size) for path, length in lengths if path in held)
        too_many = samples + len(head.sequences) > config.max_sequences
        too_long = bool(admitted) and sum(len(g.prompt.token_ids) for g in (*admitted, head)) > config.max_batch_tokens
        assert too_many or too_long or pages_alone(head, tree.page_size) - shared > free

    def promised(self, groups: list[Group]) -> int:
        """Pages that the running samples of these groups may still take."""
        size = self.scheduler.tree.page_size
        active = [s for group in groups for s in group.sequences if s.finish_reason is None]
        return sum(pages(s.group.max_tokens - 1, size) - len(s.leaf.pages) for s in active)

    def check_promises(self) -> None:
        assert self.scheduler.promised == self.promised(self.running)
        assert self.scheduler.tree.pool.num_free >= self.scheduler.promised

    def finish(self) -> None:
        for _ in range(1000):  # far more than the tokens of all groups
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.queue
        assert not self.running
        assert self.scheduler.promised == 0
        assert self.scheduler.tree.pool.num_used == 0


@settings(max_examples=120)
@given(
    page_size=st.sampled_from([1, 2, 3, 8]),
    num_pages=st.integers(1, 40),
    max_sequences=st.sampled_from([1, 2, 5, 100]),
    max_batch_tokens=st.sampled_from([1, 6, 12, 100]),
    stop_chance=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_schedule(page_size, num_pages, max_sequences, max_batch_tokens, stop_chance, seed):
    """Groups come while others run; prompts share beginnings; samples stop early; some leave the queue."""
    scheduler = scheduler_of(num_pages, page_size, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    driver = Driver(scheduler, seed, stop_chance)
    draw = driver.random
    accepted = []
    for index in range(16):
        lengths = [draw.choice((1, 2, 3, 5)) for _ in range(draw.choice((1, 2, 2, 3)))]
        group = group_of(str(index), lengths, draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 9)), draw.choice((0, 0, 1)))
        if len(group.sequences) > max_sequences or pages_alone(group, page_size) > num_pages:
            with pytest.raises(ValueError, match="expected"):
                driver.add(group)
            continue
        driver.add(group)
        accepted.append(group)
        for _ in range(draw.choice((0, 0, 1, 3))):
            driver.step()
        if driver.queue and draw.random() < 0.2:
            victim = draw.choice(driver.queue)
            assert scheduler.remove(victim)
            driver.queue.remove(victim)
            accepted.remove(victim)
        if driver.running and draw.random() < 0.2:
            victim = draw.choice(driver.running)
            assert not scheduler.remove(victim)
            for sequence in victim.sequences:
                sequence.finish_reason = sequence.finish_reason or "abort"
            driver.retire()
            driver.check_promises()
    driver.finish()
    assert sorted(map(id, driver.ended)) == sorted(map(id, accepted))
    assert all(1 <= len(s.token_ids) <= s.group.max_tokens for group in driver.ended for s in group.sequences)


def test_groups_share_one_batch_up_to_the_token_budget():
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    groups = [group_of(str(token), [4], 1, 2, token) for token in range(5)]
    for group in groups:
        driver.add(group)
    assert driver.scheduler.next(VERSIONS).groups == groups[:2], "a third prompt makes 12 tokens"
    assert driver.scheduler.next(VERSIONS).groups == groups[2:4], "prompts go before the samples that run"
    assert driver.scheduler.next(VERSIONS).groups == groups[4:]
    batch = driver.scheduler.next(VERSIONS)
    assert not batch.groups
    assert batch.sequences == [sequence for group in groups for sequence in group.sequences]


def test_prompts_that_are_found_cost_no_budget():
    scheduler = scheduler_of(100, max_batch_tokens=10)
    groups = [group_of(str(index), [8], 1, 2) for index in range(3)]
    for group in groups:
        scheduler.add(group)
    assert scheduler.next(VERSIONS).groups == groups[:1], "when it is not known yet, the prompt counts whole"
    groups[0].path[0].length = 8
    assert scheduler.next(VERSIONS).groups == groups[1:]


def test_a_prompt_longer_than_the_budget_runs_alone():
    scheduler = scheduler_of(100, max_batch_tokens=10)
    groups = [group_of("long", [25], 1, 2), group_of("short", [1], 1, 2, token=1)]
    for group in groups:
        scheduler.add(group)
    assert scheduler.next(VERSIONS).groups == groups[:1]
    assert scheduler.next(VERSIONS).groups == groups[1:]


def test_nobody_overtakes():
    """A small group behind one that does not fit yet waits with it."""
    scheduler = scheduler_of(6)
    first, large, small = (group_of(name, [2], n, 4, token=n) for name, n in (("first", 1), ("large", 2), ("small", 1)))
    for group in (first, large, small):
        scheduler.add(group)
    assert scheduler.next(VERSIONS).groups == [first], "it takes 3 of 6 pages, the next one needs 5"
    assert list(scheduler.waiting) == [large, small]
    assert scheduler.next(VERSIONS).sequences == first.sequences


def test_a_shared_prefix_is_paid_once():
    """Two groups of 4 prompt and 2 sample pages run in 8 pages, because 4 are the same."""
    scheduler = scheduler_of(8)
    groups = [group_of(str(index), [8], 2, 3) for index in range(2)]
    for group in groups:
        scheduler.add(group)
    assert scheduler.next(VERSIONS).groups == groups
    assert scheduler.tree.pool.num_used == 4
    assert scheduler.promised == 4


def test_other_weights_share_nothing():
    scheduler = scheduler_of(20)
    groups = [group_of(str(index), [8], 1, 3) for index in range(2)]
    for versions, group in enumerate(groups):
        scheduler.add(group)
        scheduler.next((versions, 0))
    assert scheduler.tree.num_shared == 0
    assert scheduler.tree.pool.num_used == 8


@pytest.mark.parametrize(("num_pages", "fits"), [(8, False), (9, True)])
def test_a_request_that_cannot_fit_is_refused(num_pages, fits):
    """Segments of 3 and 1 tokens take 2 + 1 pages of 2; two samples of 6 tokens store 5 each, in 3 pages."""
    group = group_of("", [3, 1], 2, 6)
    scheduler = scheduler_of(num_pages)
    if fits:
        scheduler.add(group)
        assert scheduler.next(VERSIONS).groups == [group]
        assert scheduler.tree.pool.num_free == scheduler.promised == 6
    else:
        with pytest.raises(ValueError, match=r"fits into 8 pages of 2 tokens .* got one of 9 pages \(kv_memory\)"):
            scheduler.add(group)
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


def test_pages_come_back_sample_by_sample():
    driver = Driver(scheduler_of(10))
    group = group_of("", [2], 2, 5)
    driver.add(group)
    for _ in range(3):
        driver.step()
    assert (driver.scheduler.tree.pool.num_used, driver.scheduler.promised) == (3, 2)
    group.sequences[0].finish_reason = "stop"
    driver.retire()
    assert (driver.scheduler.tree.pool.num_used, driver.scheduler.promised) == (2, 1)
    assert group.sequences[1].leaf.length == 2
    driver.finish()


def test_position_of_the_token_fed_next():
    """The first drawn token stands right behind the prompt."""
    (sequence,) = group_of("", [3], 1, 5).sequences
    sequence.token_ids.append(7)
    assert sequence.next_position == 3
    sequence.token_ids.append(7)
    assert sequence.next_position == 4


def test_an_empty_scheduler():
    scheduler = scheduler_of(1)
    batch = scheduler.next(VERSIONS)
    assert (batch.groups, batch.sequences, scheduler.retire(), scheduler.has_unfinished) == ([], [], [], False)
