"""The segment tree against a plain list of holds, and what makes two prompt segments equal."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foveate.rollout.pages import OutOfPages, PagePool, pages_for
from foveate.rollout.processor import ImageInput, Prompt
from foveate.rollout.segments import Segment, SegmentTree, identities

NUM_PAGES = 40


def prompt_of(*segments: list[int], images: tuple[ImageInput, ...] = (), shift: int = 0) -> Prompt:
    """A prompt of these segments, each a list of token ids; shift is added to all positions."""
    ids = torch.tensor([token for segment in segments for token in segment], dtype=torch.int64)
    ends = torch.tensor([len(segment) for segment in segments]).cumsum(0).tolist()
    positions = (torch.arange(len(ids)) + shift).expand(3, -1)
    return Prompt(ids, positions, len(ids) + shift, images, tuple(ends))


def image_of(name: bytes, start: int, num_tokens: int = 1) -> ImageInput:
    return ImageInput(name, torch.zeros(4, 2), torch.tensor([1, 2, 2]), start, num_tokens)


class TreeTrace(RuleBasedStateMachine):
    """Prompts of one to four segments, chosen so that many begin alike; holds are released in any order."""

    @initialize(page_size=st.sampled_from([1, 2, 3, 64]))
    def create(self, page_size: int) -> None:
        self.pool = PagePool(NUM_PAGES)
        self.tree = SegmentTree(self.pool, page_size)
        self.holds: list[Segment] = []  # one entry a hold of this caller
        self.shared = 0

    @rule(lengths=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), token=st.integers(0, 1))
    def acquire(self, lengths: list[int], token: int) -> None:
        prompt = prompt_of(*([token] * length for length in lengths))
        names = identities(prompt, (0, 0))
        live = {segment.identity: segment for segment in self.live()}
        missing = [length for name, length in zip(names, lengths, strict=True) if name not in live]
        needed = sum(pages_for(length, self.tree.page_size) for length in missing)
        assert self.tree.pages_needed(names, prompt) == needed
        if needed > self.pool.num_free:
            return
        path = self.tree.acquire(names, prompt)
        assert path == path[-1].path()
        assert [segment.identity for segment in path] == names
        for segment, length in zip(path, lengths, strict=True):
            if segment.identity in live:
                assert segment is live[segment.identity], "found, not made"
            else:
                assert segment.length == 0
                assert segment.prompt is prompt
                assert segment.num_missing == length
                assert len(segment.pages) == pages_for(length, self.tree.page_size)
                segment.length = length  # as the runner does
            assert segment.span[1] - segment.span[0] == length
        self.holds += path
        self.shared += len(lengths) - len(missing)

    @precondition(lambda self: any(segment.identity for segment in self.live()))
    @rule(data=st.data(), room=st.integers(0, 4), again=st.integers(0, 4))
    def branch(self, data: st.DataObject, room: int, again: int) -> None:
        parents = [segment for segment in self.live() if segment.identity]
        parent = parents[data.draw(st.integers(0, len(parents) - 1), label="parent")]
        if pages_for(room, self.tree.page_size) > self.pool.num_free:
            with pytest.raises(OutOfPages):
                self.tree.branch(parent, room)
            return
        leaf = self.tree.branch(parent, room, prompt_of([0] * again) if again else None)
        assert (leaf.parent, leaf.identity, leaf.length, leaf.num_missing) == (parent, None, 0, again)
        assert len(leaf.pages) == pages_for(room, self.tree.page_size)
        self.holds.append(leaf)

    @precondition(lambda self: any(segment.identity is None for segment in self.holds))
    @rule(data=st.data(), tokens=st.integers(1, 5))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        leaves = [segment for segment in self.holds if segment.identity is None]
        leaf = leaves[data.draw(st.integers(0, len(leaves) - 1), label="leaf")]
        for _ in range(tokens):
            if self.pool.num_free == 0:
                return
            before = len(leaf.pages)
            needed = max(before, pages_for(leaf.length + 1, self.tree.page_size))
            assert self.tree.is_full(leaf) == (needed > before)
            self.tree.grow(leaf)
            self.tree.grow(leaf)  # there is room already
            leaf.length += 1
            assert len(leaf.pages) == needed

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tree.release(self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1), label="hold")))

    def live(self) -> list[Segment]:
        """What is held, and everything above it."""
        found: dict[Segment, None] = {}
        for held in self.holds:
            segment: Segment | None = held
            while segment is not None:
                found[segment] = None
                segment = segment.parent
        return list(found)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        pages = [page for segment in self.live() for page in segment.pages]
        assert len(pages) == len(set(pages))
        assert [page for page in range(NUM_PAGES) if self.pool.is_used(page)] == sorted(pages)
        assert self.pool.num_used == len(pages)

    @invariant()
    def refs_are_holds_and_children(self) -> None:
        live = self.live()
        holds = Counter(self.holds) + Counter(segment.parent for segment in live if segment.parent)
        assert {segment: segment.refs for segment in live} == dict(holds)
        assert self.tree.num_shared == self.shared

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        while self.holds:
            self.tree.release(self.holds.pop(0))
        assert self.pool.num_used == 0
        prompt = prompt_of([0], [0])
        assert self.tree.pages_needed(identities(prompt, (0, 0)), prompt) == 2, "freed segments are not found"


TestTreeTrace = TreeTrace.TestCase
TestTreeTrace.settings = settings(max_examples=60, stateful_step_count=25)


def test_a_prefix_is_shared_by_different_prompts():
    tree = SegmentTree(PagePool(8), page_size=2)
    prompts = [prompt_of([1, 2, 3], [4]), prompt_of([1, 2, 3], [5, 6])]
    paths = [tree.acquire(identities(prompt, (0, 0)), prompt) for prompt in prompts]
    assert paths[0][0] is paths[1][0]
    assert paths[0][1] is not paths[1][1]
    assert (tree.num_shared, tree.pool.num_used) == (1, 4)
    assert paths[0][0].refs == 4, "two requests and two children"
    for segment in paths[0]:
        tree.release(segment)
    assert tree.pool.num_used == 3
    assert paths[1][0].refs == 2


def test_a_leaf_keeps_its_path_alive():
    """The request lets go of its prompt before a sample ends."""
    tree = SegmentTree(PagePool(8), page_size=2)
    prompt = prompt_of([1, 2], [3])
    path = tree.acquire(identities(prompt, (0, 0)), prompt)
    leaf = tree.branch(path[-1])
    for segment in path:
        tree.release(segment)
    assert tree.pool.num_used == 2
    tree.release(leaf)
    assert tree.pool.num_used == 0


def test_a_second_release_is_refused():
    tree = SegmentTree(PagePool(2), page_size=2)
    prompt = prompt_of([1])
    (segment,) = tree.acquire(identities(prompt, (0, 0)), prompt)
    tree.release(segment)
    with pytest.raises(AssertionError, match="released more often than acquired"):
        tree.release(segment)


def test_grow_without_pages():
    tree = SegmentTree(PagePool(1), page_size=2)
    prompt = prompt_of([1])
    (segment,) = tree.acquire(identities(prompt, (0, 0)), prompt)
    leaf = tree.branch(segment)
    with pytest.raises(OutOfPages):
        tree.grow(leaf)
    assert leaf.pages == []


BASE = prompt_of([1, 2, 3], [4, 5], images=(image_of(b"A", start=1), image_of(b"B", start=4)))


def changed(**fields: object) -> Prompt:
    return dataclasses.replace(BASE, **fields)


def other_position(plane: int, token: int) -> Prompt:
    positions = BASE.positions.clone()
    positions[plane, token] += 1
    return changed(positions=positions)


# (prompt, versions, which of the two segments differ from BASE's under versions (3, 7))
DIFFERENT = {
    "tokens of the first": (changed(token_ids=torch.tensor([1, 2, 9, 4, 5])), (3, 7), (True, True)),
    "tokens of the second": (changed(token_ids=torch.tensor([1, 2, 3, 4, 9])), (3, 7), (False, True)),
    "order of tokens": (changed(token_ids=torch.tensor([2, 1, 3, 4, 5])), (3, 7), (True, True)),
    "time": (other_position(0, 0), (3, 7), (True, True)),
    "height": (other_position(1, 2), (3, 7), (True, True)),
    "width of the second": (other_position(2, 4), (3, 7), (False, True)),
    "first image": (changed(images=(image_of(b"C", 1), image_of(b"B", 4))), (3, 7), (True, True)),
    "second image": (changed(images=(image_of(b"A", 1), image_of(b"C", 4))), (3, 7), (False, True)),
    "images swapped": (changed(images=(image_of(b"B", 1), image_of(b"A", 4))), (3, 7), (True, True)),
    "no second image": (changed(images=(image_of(b"A", 1),)), (3, 7), (False, True)),
    "boundary": (changed(boundaries=(2, 5)), (3, 7), (True, True)),
    "language version": (BASE, (4, 7), (True, True)),
    "vision version": (BASE, (3, 8), (True, True)),
    "versions swapped": (BASE, (7, 3), (True, True)),
}


@pytest.mark.parametrize(("prompt", "versions", "differs"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_is_different_has_another_identity(prompt, versions, differs):
    pairs = zip(identities(prompt, versions), identities(BASE, (3, 7)), strict=True)
    assert tuple(a != b for a, b in pairs) == differs


def test_equal_segments_of_other_parents_differ():
    """The same tokens at the same positions, seen after something else, have other keys and values."""
    first, second = identities(prompt_of([1, 1], [5]), (0, 0)), identities(prompt_of([1, 2], [5]), (0, 0))
    assert first[1] != second[1]
    alone = prompt_of([5], shift=2)
    assert identities(alone, (0, 0))[0] not in (first[1], second[1])


def test_equal_content_in_other_objects_is_equal():
    """Whatever memory layout the tensors have."""
    twin = Prompt(
        token_ids=torch.tensor([1, 0, 2, 0, 3, 0, 4, 0, 5])[::2].clone(),
        positions=torch.arange(5)[:, None].repeat(1, 3).t(),
        next_position=5,
        images=(image_of(b"A", 1), image_of(b"B", 4)),
        boundaries=(3, 5),
    )
    assert identities(twin, (3, 7)) == identities(BASE, (3, 7))
    assert identities(prompt_of([7]), (0, 0)) == identities(prompt_of([7]), (0, 0))


def test_identities_are_per_segment():
    """A longer prompt with the same beginning has the same identities there."""
    short, long = prompt_of([1, 2], [3]), prompt_of([1, 2], [3], [4, 5])
    assert identities(long, (0, 0))[:2] == identities(short, (0, 0))
