"""The tree of KV segments: runs of tokens with pages of their own and a parent, shared by identity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from foveate.rollout.pages import PagePool, pages_for
from foveate.rollout.processor import Prompt


@dataclass(eq=False)
class Segment:
    """Consecutive tokens whose keys and values lie in `pages`; a child continues where its parent ends.

    identity: hash of parent identity, tokens, positions, images and weight versions; None for a completion,
    which nobody shares. length: tokens stored so far. refs: requests and child segments that hold it.
    last_hidden: float [hidden], the final hidden state of its last token, once computed.
    """

    parent: Segment | None
    identity: bytes | None
    pages: list[int] = field(default_factory=list)
    length: int = 0
    refs: int = 1
    prompt: Prompt | None = None  # where a prompt segment's tokens come from
    span: tuple[int, int] = (0, 0)  # its tokens in that prompt
    last_hidden: torch.Tensor | None = None

    @property
    def source(self) -> Prompt:
        """The prompt that a prompt segment is part of."""
        assert self.prompt is not None, "a completion is part of no prompt"
        return self.prompt

    def path(self) -> list[Segment]:
        """From the root to this segment."""
        path, segment = [self], self.parent
        while segment is not None:
            path.append(segment)
            segment = segment.parent
        return path[::-1]


class SegmentTree:
    """Allocates segments from the page pool, finds equal prompt segments, frees what nobody holds."""

    def __init__(self, pool: PagePool, page_size: int):
        self.pool = pool
        self.page_size = page_size
        self.num_shared = 0  # prompt segments that were found, not made
        self._by_identity: dict[bytes, Segment] = {}

    def pages_needed(self, identities: list[bytes], prompt: Prompt) -> int:
        """Pages that `acquire` would take for this prompt now."""
        spans = _spans(prompt)
        return sum(
            pages_for(stop - start, self.page_size)
            for identity, (start, stop) in zip(identities, spans, strict=True)
            if identity not in self._by_identity
        )

    def acquire(self, identities: list[bytes], prompt: Prompt) -> list[Segment]:
        """The prompt's segments, root first: those that exist, then new ones with pages and no KV yet."""
        path: list[Segment] = []
        for identity, (start, stop) in zip(identities, _spans(prompt), strict=True):
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

    def branch(self, parent: Segment) -> Segment:
        """A new, empty completion segment below parent; it takes pages as it grows."""
        parent.refs += 1
        return Segment(parent, identity=None)

    def grow(self, segment: Segment) -> None:
        """Makes room for one more token."""
        if segment.length == len(segment.pages) * self.page_size:
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
    for start, stop in _spans(prompt):
        digest = hashlib.blake2b(parent, digest_size=16)
        digest.update(prompt.token_ids[start:stop].numpy().data)
        digest.update(prompt.positions[:, start:stop].contiguous().numpy().data)
        for image in prompt.images:
            if start <= image.start < stop:
                digest.update(image.content_hash)
        parent = digest.digest()
        result.append(parent)
    return result


def _spans(prompt: Prompt) -> list[tuple[int, int]]:
    return list(zip((0, *prompt.boundaries[:-1]), prompt.boundaries, strict=True))
