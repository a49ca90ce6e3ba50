"""Which work the next step does: who decodes, what is prefilled, who waits, and whose pages are taken."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from foveate.rollout.config import EngineConfig
from foveate.rollout.prefill import Prefill
from foveate.rollout.processor import Prompt
from foveate.rollout.pruned import adopt, begin
from foveate.rollout.segments import Chunk, Segment, SegmentTree, identities
from foveate.rollout.tagged import OUTSIDE, Place, SpanMasks
from foveate.rollout.text import TextDecoder
from foveate.rollout.types import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """One sample of a group while it runs. The lists grow by one a token; the runner fills them."""

    group: Group
    seed: int = 0  # int64, two's complement of the unsigned sample seed
    leaf: Segment | None = None  # while it runs
    is_ready: bool = False  # it runs, and its next step is a decode: all tokens but the last drawn are stored
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    log_kept: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    decoder: TextDecoder | None = None  # only with stop strings
    place: Place = OUTSIDE  # in the spans of `SamplingParams.tagged`
    num_certain: int = 0  # tokens in a row, up to the last, that were all but certain
    versions: list[tuple[int, int, int]] = field(default_factory=list)  # (start, end, weight version), see `mark`

    @property
    def next_position(self) -> int:
        """Position of the token that was drawn last and is fed next."""
        return self.group.prompt.next_position + len(self.token_ids) - 1

    @property
    def allowed(self) -> torch.Tensor | None:
        """int32 [words], bits of the ids it may draw next; None: all. The same tensor for the same state."""
        early = len(self.token_ids) < self.group.request.sampling.min_tokens
        if self.group.spans is not None:
            return self.group.spans.mask(self.place, early)
        return self.group.allowed_early if early else self.group.allowed

    @property
    def is_waiting(self) -> bool:
        return self.leaf is None and self.finish_reason is None

    @property
    def room(self) -> int:
        """Tokens that it must be able to store to draw one more; the one drawn last is never fed."""
        return min(max(len(self.token_ids), 1), self.group.max_tokens - 1)

    @property
    def num_pages(self) -> int:
        """Pages of its own."""
        return len(self.leaf.pages) if self.leaf else 0

    def mark(self, version: int) -> None:
        """Notes that the tokens drawn since the last call were drawn with this version of the weights."""
        start = self.versions[-1][1] if self.versions else 0
        if len(self.token_ids) > start:
            self.versions.append((start, len(self.token_ids), version))

    def stored(self) -> Prompt | None:
        """Tokens to prefill when it comes back: those drawn, but for the last one, which is fed by a decode."""
        count = len(self.token_ids) - 1
        if count < 1:
            return None
        start = self.group.prompt.next_position
        positions = torch.arange(start, start + count, device="cpu").expand(3, -1)
        return Prompt(torch.tensor(self.token_ids[:-1], device="cpu"), positions, start + count, (), (count,))


@dataclass(eq=False)
class Group:
    """One request while it waits and runs; filled by the engine, the path by the scheduler."""

    request: Request
    request_id: str
    prompt: Prompt
    max_tokens: int
    stop_ids: frozenset[int]
    allowed: torch.Tensor | None  # int32 [words], bits of the ids that may be drawn (`sampling.masks`); None: all
    allowed_early: torch.Tensor | None  # the same while fewer than min_tokens are drawn
    spans: SpanMasks | None = None  # with SamplingParams.tagged
    # (weight versions, whether the selection between layers is known), identity of each segment
    identities: tuple[tuple[tuple[int, int], bool], list[bytes]] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    path: list[Segment] = field(default_factory=list)
    was_admitted: bool = False
    is_kept: bool = False  # the path holds keys of older weights
    kept_versions: list[int] = field(default_factory=list)  # of weights before updates over which it was kept
    error: ValueError | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)


@dataclass
class Batch:
    """One step's work, in this order."""

    decodes: list[Sequence]  # samples that feed their last token and draw the next one
    chunks: list[Chunk]  # to prefill, parents before their children
    firsts: list[Sequence]  # samples that draw their first token once the chunks are done


class Scheduler:
    """First come, first served, by group and then by sample: who runs is always a beginning of that order.

    A step decodes every running sample whose tokens are stored and prefills up to `max_batch_tokens` tokens of
    the others, prompts in chunks if need be. A group is admitted when its prompt and a first page for each of its
    samples fit. Samples take pages as they grow; when none is left, the sample that comes last in the order gives
    up its own, and its group the prompt with the last of its samples. It keeps the tokens it has drawn and is
    the first to come back, when its pages fit and one more for each running sample; its tokens are then prefilled
    again. So the oldest group always goes on, and a straggler waits for nobody who came after it.

    What is kept over an update of the weights (`keep`) is never preempted: it stands at the beginning of the order, and
    only as much is kept as fits into the pool to the last token of each sample. Samples of a kept group that wait
    start when the kept ones have ended, on a prompt of the new weights.
    """

    def __init__(self, config: EngineConfig, tree: SegmentTree):
        self.config = config
        self.tree = tree
        self.waiting: deque[Group] = deque()  # oldest first; only the first may have samples that run
        self.running: list[Sequence] = []  # oldest first
        self.num_preempted = 0  # samples, each time

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, group: Group) -> None:
        """Raises ValueError if the request could not run even alone."""
        samples, limit = len(group.sequences), self.config.max_sequences
        if samples > limit:
            raise ValueError(f"expected n <= max_sequences = {limit}, got {samples} (n)")
        tree = self.tree
        pages = sum(tree.prompt_pages(group.prompt))
        pages += max(sum(tree.pages_for(s.room) for s in group.sequences), tree.pages_for(group.max_tokens - 1))
        if pages > tree.pool.num_pages:
            have = f"{tree.pool.num_pages} pages of {tree.page_size} tokens"
            raise ValueError(
                f"expected a request that fits into {have} of KV memory, got one of {pages} pages (kv_memory)"
            )

    def add(self, group: Group) -> None:
        """Queues a group; ValueError as `check`."""
        self.check(group)
        self.waiting.append(group)

    def next(self, versions: tuple[int, int]) -> Batch:
        """Makes room for what runs, plans its prefill, then admits what else fits into the step."""
        decodes = self._grow()
        plan = Prefill(self.config.max_batch_tokens)
        for sequence in self.running:
            if not sequence.is_ready:
                plan.add(sequence)
        while plan.budget and self.waiting and (samples := self._admissible(self.waiting[0], versions)):
            self._start(samples, versions)
            for sequence in samples:
                plan.add(sequence)
        for chunk in plan.chunks:
            begin(chunk.segment.source, versions)
        return Batch(decodes, plan.chunks, plan.firsts)

    def identify(self, group: Group, versions: tuple[int, int]) -> list[bytes]:
        """Identity of each segment of the group's prompt; hashed once for weight versions and what was selected."""
        key = versions, group.prompt.pruning is not None and bool(group.prompt.pruning.layer_sites)
        if group.identities is None or group.identities[0] != key:
            group.identities = key, identities(group.prompt, versions)
        return group.identities[1]

    def retire(self) -> list[Group]:
        """Takes finished samples off the running list, frees their KV, and returns the groups that ended."""
        done = [sequence for sequence in self.running if sequence.finish_reason]
        if not done:
            return []
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in done:
            self._drop_leaf(sequence)
        ended = [group for group in dict.fromkeys(sequence.group for sequence in done) if group.is_finished]
        for group in ended:
            if self.waiting and self.waiting[0] is group:
                self.waiting.popleft()
            self._drop_path(group)
        if self.waiting and self.waiting[0].is_kept:
            self._drop_unused_path()
        return ended

    def keep(self, version: int, changes_vision: bool) -> None:
        """Before the weights stop to be `version`: what runs keeps its KV for good, what waits is computed anew.

        The last samples of the order give up their pages until the pool could hold the others to their last token.
        Features of images that were embedded in part are dropped if the tower changes: the rest takes new ones.
        """
        tree, pool = self.tree, self.tree.pool
        while sum(tree.pages_for(s.group.max_tokens - 1) - s.num_pages for s in self.running) > pool.num_free:
            self._preempt()
        self._drop_unused_path()
        kept = dict.fromkeys(sequence.group for sequence in self.running)
        for group in kept:
            group.is_kept = True
            group.kept_versions.append(version)
            for segment in group.path if changes_vision else ():
                segment.features = {}
        for sequence in (s for group in {*kept, *self.waiting} for s in group.sequences):
            sequence.mark(version)

    def remove(self, group: Group) -> bool:
        """Forgets a group whose samples have ended; False, and nothing happens, if any of them still holds KV."""
        if any(sequence.leaf for sequence in group.sequences):
            return False
        if group in self.waiting:
            self.waiting.remove(group)
        self._drop_path(group)
        return True

    def _grow(self) -> list[Sequence]:
        """The samples to decode, each with room for the token it feeds."""
        decodes = []
        for sequence in list(self.running):  # oldest first: those whose pages are taken come later
            leaf = sequence.leaf
            if leaf is None or not sequence.is_ready:
                continue
            while sequence.leaf is leaf and not self.tree.can_grow(leaf):
                self._preempt()
            if sequence.leaf is leaf:
                self.tree.grow(leaf)
                decodes.append(sequence)
        return decodes

    def _drop_unused_path(self) -> None:
        """Takes its prompt from the first group that waits if none of its samples runs."""
        if self.waiting and all(sequence.group is not self.waiting[0] for sequence in self.running):
            self._drop_path(self.waiting[0])

    def _preempt(self) -> None:
        """Takes what the last holder of pages in the order has: a sample's, then its group's prompt."""
        last = self.running[-1].group
        if self.waiting and self.waiting[0].path and self.waiting[0] is not last:
            self._drop_path(self.waiting[0])
            return
        assert not last.is_kept, f"request {last.request_id!r} was promised its pages"
        sequence = self.running.pop()
        self._drop_leaf(sequence)
        self.num_preempted += 1
        if not self.waiting or self.waiting[0] is not last:
            self.waiting.appendleft(last)
        if not self.running or self.running[-1].group is not last:
            self._drop_path(last)

    def _admissible(self, group: Group, versions: tuple[int, int]) -> list[Sequence]:
        """Which samples of the first waiting group can start now: all of a new group, else the next one, or none."""
        if group.is_kept:
            return []
        samples = [sequence for sequence in group.sequences if sequence.is_waiting]
        wanted = 0 if group.path else self.tree.pages_needed(self.identify(group, versions), group.prompt)
        if group.was_admitted:
            samples = samples[:1]
            wanted += self.tree.pages_for(1) * len(self.running)  # else it would soon be thrown out again
        wanted += sum(self.tree.pages_for(sequence.room) for sequence in samples)
        fits = len(self.running) + len(samples) <= self.config.max_sequences
        return samples if fits and wanted <= self.tree.pool.num_free else []

    def _start(self, samples: list[Sequence], versions: tuple[int, int]) -> None:
        group = samples[0].group
        if not group.path:
            group.path = self.tree.acquire(self.identify(group, versions), group.prompt)
            begin(group.prompt, versions)
        for sequence in samples:
            sequence.leaf = self.tree.branch(group.path[-1], sequence.room, sequence.stored())
        group.was_admitted = True
        self.running.extend(samples)
        if not any(sequence.is_waiting for sequence in group.sequences):
            self.waiting.popleft()

    def _drop_leaf(self, sequence: Sequence) -> None:
        assert sequence.leaf is not None, sequence.group.request_id
        self.tree.release(sequence.leaf)
        sequence.leaf, sequence.is_ready = None, False

    def _drop_path(self, group: Group) -> None:
        for segment in group.path:
            adopt(group.prompt, segment.source, segment.span)
            if segment.tail is not None:
                segment.tail.hand_to(group.prompt)
            self.tree.release(segment)
        group.path, group.is_kept = [], False
