"""Which work the next step does: prompts waiting for their prefill, samples running, pages promised to them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from foveate.rollout.config import EngineConfig
from foveate.rollout.pages import pages_for
from foveate.rollout.processor import Prompt
from foveate.rollout.segments import Segment, SegmentTree, identities
from foveate.rollout.text import TextDecoder
from foveate.rollout.types import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """One sample of a group while it runs. The lists grow by one a token; the runner fills them."""

    group: Group
    seed: int  # int64, two's complement of the unsigned sample seed
    leaf: Segment | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_kept: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    decoder: TextDecoder | None = None  # only with stop strings

    @property
    def next_position(self) -> int:
        """Position of the token that was drawn last and is fed next."""
        return self.group.prompt.next_position + len(self.token_ids) - 1


@dataclass(eq=False)
class Group:
    """One request while it waits and runs; filled by the engine, the path by the scheduler."""

    request: Request
    request_id: str
    prompt: Prompt
    max_tokens: int
    stop_ids: frozenset[int]
    banned: torch.Tensor  # bool [vocab]
    banned_early: torch.Tensor  # bool [vocab], while fewer than min_tokens are drawn
    identities: tuple[tuple[int, int], list[bytes]] | None = None  # weight versions, identity of each segment
    sequences: list[Sequence] = field(default_factory=list)
    path: list[Segment] = field(default_factory=list)
    error: ValueError | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)


@dataclass
class Batch:
    """One step's work: either groups whose prompt is prefilled and first tokens are drawn, or running samples."""

    groups: list[Group]
    sequences: list[Sequence]


class Scheduler:
    """First come, first served; a group starts when all its samples can run to their last token.

    Pages for that are promised, not taken: `promised` counts what running samples may still allocate, so an
    admitted group never runs out of pages.
    """

    def __init__(self, config: EngineConfig, tree: SegmentTree):
        self.config = config
        self.tree = tree
        self.waiting: deque[Group] = deque()
        self.running: list[Sequence] = []
        self.promised = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, group: Group) -> None:
        """Raises ValueError if the request could not run even alone."""
        samples, limit = len(group.sequences), self.config.max_sequences
        if samples > limit:
            raise ValueError(f"expected n <= max_sequences = {limit}, got {samples} (n)")
        pages = sum(
            pages_for(stop - start, self.tree.page_size)
            for start, stop in zip((0, *group.prompt.boundaries[:-1]), group.prompt.boundaries, strict=True)
        )
        pages += samples * self._pages_per_sample(group)
        if pages > self.tree.pool.num_pages:
            have = f"{self.tree.pool.num_pages} pages of {self.tree.page_size} tokens"
            raise ValueError(
                f"expected a request that fits into {have} of KV memory, got one of {pages} pages (kv_memory)"
            )
        self.waiting.append(group)

    def next(self, versions: tuple[int, int]) -> Batch:
        """Prompts first, as many as the token budget, the sample limit and the pages allow; else decode."""
        groups: list[Group] = []
        tokens = 0
        while self.waiting and self._admits(self.waiting[0], versions, tokens):
            group = self.waiting.popleft()
            group.path = self.tree.acquire(self.identify(group, versions), group.prompt)
            tokens += sum(s.span[1] - s.span[0] for s in group.path if s.length == 0 and s.prompt is group.prompt)
            for sequence in group.sequences:
                sequence.leaf = self.tree.branch(group.path[-1])
            self.promised += len(group.sequences) * self._pages_per_sample(group)
            self.running.extend(group.sequences)
            groups.append(group)
        return Batch(groups, [] if groups else list(self.running))

    def identify(self, group: Group, versions: tuple[int, int]) -> list[bytes]:
        """Identity of each segment of the group's prompt; hashed once for a pair of weight versions."""
        if group.identities is None or group.identities[0] != versions:
            group.identities = versions, identities(group.prompt, versions)
        return group.identities[1]

    def retire(self) -> list[Group]:
        """Takes finished samples off the running list, frees their KV, and returns the groups that ended."""
        done = [sequence for sequence in self.running if sequence.finish_reason]
        if not done:
            return []
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        ended: list[Group] = []
        for sequence in done:
            group, leaf = sequence.group, sequence.leaf
            assert leaf is not None, group.request_id
            self.promised -= self._pages_per_sample(group) - len(leaf.pages)
            self.tree.release(leaf)
            sequence.leaf = None
            if group.is_finished and group not in ended:
                ended.append(group)
        for group in ended:
            for segment in group.path:
                self.tree.release(segment)
            group.path = []
        return ended

    def remove(self, group: Group) -> bool:
        """Takes a group off the waiting queue; False if it runs already."""
        if group not in self.waiting:
            return False
        self.waiting.remove(group)
        return True

    def grow(self, sequence: Sequence) -> None:
        """Makes room for the token fed next; the page was promised."""
        leaf = sequence.leaf
        assert leaf is not None, sequence.group.request_id
        before = len(leaf.pages)
        self.tree.grow(leaf)
        self.promised -= len(leaf.pages) - before

    def _admits(self, group: Group, versions: tuple[int, int], tokens: int) -> bool:
        if len(self.running) + len(group.sequences) > self.config.max_sequences:
            return False
        if tokens and tokens + len(group.prompt.token_ids) > self.config.max_batch_tokens:
            return False
        wanted = self.tree.pages_needed(self.identify(group, versions), group.prompt)
        wanted += len(group.sequences) * self._pages_per_sample(group)
        return wanted <= self.tree.pool.num_free - self.promised

    def _pages_per_sample(self, group: Group) -> int:
        # The token that is drawn last is never fed, so its keys are never stored.
        return pages_for(group.max_tokens - 1, self.tree.page_size)
