"""A scheduler's life without an engine: groups made by hand, and a driver that checks every step's plan."""

from __future__ import annotations

import random
from typing import Any

import torch

from foveate.rollout.config import EngineConfig, SamplingParams
from foveate.rollout.pages import PagePool
from foveate.rollout.processor import Prompt
from foveate.rollout.scheduler import Batch, Group, Scheduler, Sequence
from foveate.rollout.segments import Segment, SegmentTree
from foveate.rollout.types import Request

NO_BANS = torch.zeros(0, dtype=torch.bool)


def group_of(name: str, lengths: list[int], n: int, max_tokens: int, token: int = 0) -> Group:
    """A group whose prompt has segments of these lengths, all of one token id."""
    total = sum(lengths)
    ends = tuple(torch.tensor(lengths).cumsum(0).tolist())
    prompt = Prompt(torch.full((total,), token), torch.arange(total).expand(3, -1), total, (), ends)
    request = Request([token], n=n, sampling=SamplingParams(max_tokens=max_tokens))
    group = Group(request, name, prompt, max_tokens, frozenset(), NO_BANS, NO_BANS)
    group.sequences = [Sequence(group, seed=index) for index in range(n)]
    return group


def scheduler_of(num_pages: int, page_size: int = 2, **config: Any) -> Scheduler:
    """A scheduler of its own pool."""
    return Scheduler(EngineConfig(page_size=page_size, **config), SegmentTree(PagePool(num_pages), page_size))


def pages(tokens: int, page_size: int) -> int:
    """Pages that hold so many tokens."""
    return (tokens + page_size - 1) // page_size


def lengths_of(group: Group) -> list[int]:
    """Tokens of each segment of the prompt."""
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
        self.version = 0
        self.kept: set[Sequence] = set()  # over an update

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
        """One step, with what every step must keep to."""
        free, preempted = self.scheduler.tree.pool.num_free, self.scheduler.num_preempted
        before = [s for s in self.order if s.leaf is not None]
        ready = [s for s in before if s.token_ids and is_stored(s)]
        needed = sum(leaf_of(s).length == len(leaf_of(s).pages) * self.size for s in ready)
        batch = self.scheduler.next((self.version, 0))
        running = [s for s in self.order if s.leaf is not None]
        assert running == self.scheduler.running == self.order[: len(running)], "who runs is a beginning of the order"
        assert running[:1] == self.order[:1], "the oldest goes on"
        assert all(s.leaf is not None or s.finish_reason for s in self.kept), "what is kept is never taken"
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
            leaf = leaf_of(sequence)
            assert leaf.length == len(sequence.token_ids) - 1 < len(leaf.pages) * self.size
            leaf.length += 1
        for segment, start, stop in batch.chunks:
            assert segment.length == start < stop <= segment.span[1] - segment.span[0] <= len(segment.pages) * self.size
            assert segment.parent is None or not segment.parent.num_missing, "parents go before children"
            segment.length = stop
        assert sum(stop - start for _, start, stop in batch.chunks) <= self.scheduler.config.max_batch_tokens
        assert batch.firsts == [s for s in running if not s.token_ids and is_stored(s)]

    def is_kept(self, group: Group) -> bool:
        return any(sequence.leaf is not None for sequence in group.sequences if sequence in self.kept)

    def keep(self) -> None:
        """An update: the longest beginning of the order that fits to its end keeps its KV, and nobody else any."""
        before = [s for s in self.order if s.leaf is not None]
        lengths = {s: [segment.length for segment in (*s.group.path, leaf_of(s))] for s in before}
        preempted = self.scheduler.num_preempted
        sizes = [self.pages_to_the_end(before[: count + 1]) for count in range(len(before))]
        fitting = sum(size <= self.scheduler.tree.pool.num_pages for size in sizes)
        self.scheduler.keep(self.version, changes_vision=False)
        self.version += 1
        running = [s for s in self.order if s.leaf is not None]
        assert running == self.scheduler.running == before[:fitting]
        assert running or not before
        assert {s: [segment.length for segment in (*s.group.path, leaf_of(s))] for s in running} == {
            s: lengths[s] for s in running
        }
        assert self.scheduler.num_preempted == preempted + len(before) - fitting
        assert self.kept & set(before) <= set(running), "what was kept before is kept again"
        self.kept |= set(running)
        self.check_pages()
        assert {group for group in self.unfinished if group.path} == {s.group for s in running}

    def pages_to_the_end(self, sequences: list[Sequence]) -> int:
        """What these samples take once each has stored all that it ever feeds."""
        prompts = {segment for s in sequences for segment in s.group.path}
        return sum(len(p.pages) for p in prompts) + sum(pages(s.group.max_tokens - 1, self.size) for s in sequences)

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
        if any(s.group is group for s in self.kept if s.leaf is not None):
            return  # it waits for a prompt of the new weights
        held = {path for g in self.unfinished if g.path and not self.is_kept(g) for path in paths_of(g)}
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
            leaf, stored = leaf_of(sequence), max(len(sequence.token_ids) - 1, 0)
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


def leaf_of(sequence: Sequence) -> Segment:
    """The segment of a sample that runs."""
    assert sequence.leaf is not None, sequence.group.request_id
    return sequence.leaf


def is_stored(sequence: Sequence) -> bool:
    """Whether the prompt and all drawn tokens but the last have their keys."""
    path = sequence.group.path
    prompt = bool(path) and [segment.length for segment in path] == lengths_of(sequence.group)
    return prompt and sequence.leaf is not None and sequence.leaf.length == max(len(sequence.token_ids) - 1, 0)
