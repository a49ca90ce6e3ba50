"""The tree of KV segments: runs of tokens with pages of their own and a parent, shared by identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from foveate.rollout.layer_groups import ONE_GROUP, LayerGroups
from foveate.rollout.pages import PagePool, pages_for
from foveate.rollout.processor import Prompt
from foveate.rollout.tails import Tail, fingerprint, is_pruned_inside, tail_of

Tables = tuple[np.ndarray, ...]
NO_PAGES: Tables = (np.empty((1, 0), np.int32),)


@dataclass(eq=False)
class Segment:
    """Consecutive tokens whose keys and values lie in the pages of `tables`; a child continues where its parent ends.

    identity: hash of parent identity, tokens, positions, images and weight versions; None for a completion,
    which nobody shares. tables: by layer group int32 [blocks, pages], pages of each block of layers (`LayerGroups`),
    first token first; replaced as a whole when pages come, behind those that are there, or go. length: tokens stored so
    far, in the first layer group. refs: requests and child segments that hold it. features: float [tokens, hidden] by
    content hash, of images whose tokens were embedded in part.
    last_hidden: float [hidden], the final hidden state of its last token, once computed.
    tail, held: of a segment that loses tokens between layers, its prompt's tail and its tokens by layer group.
    number: no other segment's, ever.
    """

    parent: Segment | None
    identity: bytes | None
    tables: Tables = NO_PAGES
    length: int = 0
    refs: int = 1
    prompt: Prompt | None = None  # where tokens to prefill come from
    span: tuple[int, int] = (0, 0)  # those tokens in that prompt
    features: dict[bytes, torch.Tensor] = field(default_factory=dict)
    last_hidden: torch.Tensor | None = None
    tail: Tail | None = None
    held: tuple[int, ...] = ()
    number: int = field(default_factory=count().__next__)

    @property
    def pages(self) -> list[int]:
        """All its pages, block by block."""
        return [page for table in self.tables for page in table.ravel().tolist()]

    @property
    def source(self) -> Prompt:
        """Where the tokens come from that this segment prefills."""
        assert self.prompt is not None, "a segment that only grows is part of no prompt"
        return self.prompt

    @property
    def num_missing(self) -> int:
        """Tokens still to prefill."""
        return max(0, self.span[1] - self.span[0] - self.length)

    @property
    def ends_tail(self) -> bool:
        """Whether it is the last segment of a prompt that is pruned inside the language model."""
        return self.tail is not None and self.span[1] == len(self.tail.prompt.token_ids)

    def stored(self, group: int) -> int:
        """Tokens whose keys and values the layers of a group hold."""
        if group == 0 or self.tail is None:
            return self.length
        return self.held[group] if self.tail.is_complete else 0

    def path(self) -> list[Segment]:
        """From the root to this segment."""
        path, segment = [self], self.parent
        while segment is not None:
            path.append(segment)
            segment = segment.parent
        return path[::-1]


class Chunk(NamedTuple):
    """Tokens [start, stop) of a segment, prefilled in one step; those before it are stored already."""

    segment: Segment
    start: int
    stop: int

    @property
    def span(self) -> slice:
        """These tokens in the segment's source."""
        first = self.segment.span[0]
        return slice(first + self.start, first + self.stop)


class SegmentTree:
    """Allocates segments from the page pool, finds equal prompt segments, frees what nobody holds."""

    def __init__(self, pool: PagePool, page_size: int, groups: LayerGroups = ONE_GROUP):
        self.pool = pool
        self.page_size = page_size
        self.groups = groups
        self.num_shared = 0  # prompt segments that were found, not made
        self._by_identity: dict[bytes, Segment] = {}

    @property
    def held_bytes(self) -> int:
        """Hidden states that wait for the last token of their prompt."""
        return sum({id(s.tail): s.tail.held_bytes for s in self._by_identity.values() if s.tail}.values())

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens in all layers."""
        return self.groups.num_blocks * pages_for(tokens, self.page_size)

    def prompt_pages(self, prompt: Prompt) -> list[int]:
        """Pages of each segment of a prompt."""
        tail = tail_of(prompt, self.groups)
        return [self._total(self._widths(span, _within(tail, span))) for span in spans(prompt)]

    def pages_needed(self, identities: list[bytes], prompt: Prompt) -> int:
        """Pages that `acquire` would take for this prompt now."""
        sizes = self.prompt_pages(prompt)
        return sum(n for identity, n in zip(identities, sizes, strict=True) if identity not in self._by_identity)

    def acquire(self, identities: list[bytes], prompt: Prompt) -> list[Segment]:
        """The prompt's segments, root first: those that exist, then new ones with pages and no KV yet."""
        path: list[Segment] = []
        tail = tail_of(prompt, self.groups)
        for identity, span in zip(identities, spans(prompt), strict=True):
            parent = path[-1] if path else None
            segment = self._by_identity.get(identity)
            if segment is None:
                own = _within(tail, span)
                tables = self._allocate(self._widths(span, own))
                segment = Segment(parent, identity, tables, refs=0, prompt=prompt, span=span)
                if own is not None:
                    segment.tail, segment.held = own, own.tokens(span)
                self._by_identity[identity] = segment
                if parent is not None:
                    parent.refs += 1
            else:
                self.num_shared += 1
            segment.refs += 1
            path.append(segment)
        return path

    def branch(self, parent: Segment, room: int = 0, again: Prompt | None = None) -> Segment:
        """A new completion segment below parent, with pages for `room` tokens; it takes more as it grows.

        again: tokens to prefill, those that a sample had stored before its pages were taken.
        """
        span = (0, 0 if again is None else len(again.token_ids))
        tables = self._allocate([pages_for(room, self.page_size)] * self.groups.count)
        parent.refs += 1
        return Segment(parent, identity=None, tables=tables, prompt=again, span=span)

    def is_full(self, segment: Segment) -> bool:
        """Whether one more token of a completion takes more pages, one a block."""
        return segment.length % self.page_size == 0 and segment.length == segment.tables[0].shape[1] * self.page_size

    def can_grow(self, segment: Segment) -> bool:
        """Whether there is room for one more token, or the pages for it."""
        return self.pool.num_free >= self.groups.num_blocks or not self.is_full(segment)

    def grow(self, segment: Segment) -> None:
        """Makes room for one more token."""
        if self.is_full(segment):
            more = zip(segment.tables, self._allocate([1] * self.groups.count), strict=True)
            segment.tables = tuple(np.concatenate(both, axis=1) for both in more)

    def release(self, segment: Segment) -> None:
        """Drops one hold; a segment that nobody holds gives its pages back, and its hold on the parent."""
        held: Segment | None = segment
        while held is not None:
            held.refs -= 1
            assert held.refs >= 0, f"segment released more often than acquired: {held.refs}"
            if held.refs:
                return
            self.pool.free(held.pages)
            held.tables = tuple(table[:, :0] for table in held.tables)
            if held.identity is not None:
                del self._by_identity[held.identity]
            held = held.parent

    def _widths(self, span: tuple[int, int], tail: Tail | None) -> list[int]:
        """Pages a block, by layer group, of a segment of a prompt."""
        if tail is None:
            return [pages_for(span[1] - span[0], self.page_size)] * self.groups.count
        return [pages_for(tokens, self.page_size) for tokens in tail.tokens(span)]

    def _total(self, widths: list[int]) -> int:
        return sum(width * len(blocks) for width, blocks in zip(widths, self.groups.blocks, strict=True))

    def _allocate(self, widths: list[int]) -> Tables:
        """Tables of so many pages a block, by layer group; all or none."""
        pages, tables = np.array(self.pool.allocate(self._total(widths)), np.int32), []
        start = 0
        for width, blocks in zip(widths, self.groups.blocks, strict=True):
            stop = start + width * len(blocks)
            tables.append(pages[start:stop].reshape(len(blocks), width))
            start = stop
        return tuple(tables)


def identities(prompt: Prompt, versions: tuple[int, int]) -> list[bytes]:
    """Identity of each segment of a prompt under (language, vision) weight versions.

    Of a pruned prompt that of all its tokens, and of the selections from its images. What is pruned between layers
    depends on the prompt's last token: there, from the first image on, on the whole prompt.
    """
    result, parent = [], repr(versions).encode()
    full = prompt.pruning.full if prompt.pruning else prompt
    whole = fingerprint(prompt) if is_pruned_inside(prompt) else b""
    for start, stop in spans(full):
        digest = hashlib.blake2b(parent, digest_size=16)
        if whole and full.images[0].start < stop:
            digest.update(whole)
        digest.update(full.token_ids[start:stop].numpy().data)
        digest.update(full.positions[:, start:stop].contiguous().numpy().data)
        for image in full.images:
            if start <= image.start < stop:
                digest.update(image.content_hash)
                if prompt.pruning:
                    digest.update(prompt.pruning.key(image, versions[1]))
        parent = digest.digest()
        result.append(parent)
    return result


def _within(tail: Tail | None, span: tuple[int, int]) -> Tail | None:
    """The tail of a prompt, for a segment that belongs to it."""
    return tail if tail is not None and tail.prompt.images[0].start < span[1] else None


def spans(prompt: Prompt) -> list[tuple[int, int]]:
    """Start and end of each segment of the prompt."""
    return list(zip((0, *prompt.boundaries[:-1]), prompt.boundaries, strict=True))
