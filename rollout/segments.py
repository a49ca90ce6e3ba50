"""The tree of KV segments: runs of tokens with pages of their own and a parent, shared by identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from foveate.rollout.pages import PagePool, pages_for
from foveate.rollout.processor import Prompt


@dataclass(eq=False)
class Segment:
    """Consecutive tokens whose keys and values lie in `pages`; a child continues where its parent ends.

    identity: hash of parent identity, tokens, positions, images and weight versions; None for a completion,
    which nobody shares. length: tokens stored so far. refs: requests and child segments that hold it.
    features: float [tokens, hidden] by content hash, of images whose tokens were embedded in part.
    last_hidden: float [hidden], the final hidden state of its last token, once computed.
    """

    parent: Segment | None
    identity: bytes | None
    pages: list[int] = field(default_factory=list)
    length: int = 0
    refs: int = 1
    prompt: Prompt | None = None  # where tokens to prefill come from
    span: tuple[int, int] = (0, 0)  # those tokens in that prompt
    features: dict[bytes, torch.Tensor] = field(default_factory=dict)
    last_hidden: torch.Tensor | None = None

    @property
    def source(self) -> Prompt:
        """Where the tokens come from that this segment prefills."""
        assert self.prompt is not None, "a segment that only grows is part of no prompt"
        return self.prompt

    @property
    def num_missing(self) -> int:
        """Tokens still to prefill."""
        return max(0, self.span[1] - self.span[0] - self.length)

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

    def __init__(self, pool: PagePool, page_size: int):
        self.pool = pool
        self.page_size = page_size
        self.num_shared = 0  # prompt segments that were found, not made
        self._by_identity: dict[bytes, Segment] = {}

    def pages_needed(self, identities: list[bytes], prompt: Prompt) -> int:
        """Pages that `acquire` would take for this prompt now."""
        return sum(
            pages_for(stop - start, self.page_size)
            for identity, (start, stop) in zip(identities, spans(prompt), strict=True)
            if identity not in self._by_identity
        )

    def acquire(self, identities: list[bytes], prompt: Prompt) -> list[Segment]:
        """The prompt's segments, root first: those that exist, then new ones with pages and no KV yet."""
        path: list[Segment] = []
        for identity, (start, stop) in zip(identities, spans(prompt), strict=True):
            parent = path[-1] if path else None
            segment = self._by_identity.get(identity)
            if segment is None:
                pages = self.pool.allocate(pages_for(stop - start, self.page_size))
                segment = Segment(parent, identity, pages, refs=0, prompt=prompt, span=(start, stop))
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
        pages = self.pool.allocate(pages_for(room, self.page_size))
        parent.refs += 1
        return Segment(parent, identity=None, pages=pages, prompt=again, span=span)

    def is_full(self, segment: Segment) -> bool:
        """Whether one more token takes another page."""
        return segment.length == len(segment.pages) * self.page_size

    def grow(self, segment: Segment) -> None:
        """Makes room for one more token."""
        if self.is_full(segment):
            segment.pages.extend(self.pool.allocate(1))

    def release(self, segment: Segment) -> None:
        """Drops one hold; a segment that nobody holds gives its pages back, and its hold on the parent."""
        held: Segment | None = segment
        while held is not None:
            held.refs -= 1
            assert held.refs >= 0, f"segment released more often than acquired: {held.refs}"
            if held.refs:
                return
            self.pool.free(held.pages)
            held.pages = []
            if held.identity is not None:
                del self._by_identity[held.identity]
            held = held.parent


def identities(prompt: Prompt, versions: tuple[int, int]) -> list[bytes]:
    """Identity of each segment of a prompt under (language, vision) weight versions."""
    result, parent = [], repr(versions).encode()
    for start, stop in spans(prompt):
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(prompt.token_ids[start:stop].numpy().data)
        digest.update(prompt.positions[:, start:stop].contiguous().numpy().data)
        for image in prompt.images:
            if start <= image.start < stop:
                digest.update(image.content_hash)
        parent = digest.digest()
        result.append(parent)
    return result


def spans(prompt: Prompt) -> list[tuple[int, int]]:
    """Start and end of each segment of the prompt."""
    return list(zip((0, *prompt.boundaries[:-1]), prompt.boundaries, strict=True))
