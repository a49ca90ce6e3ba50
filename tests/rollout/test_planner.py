"""Step plans against a slow construction that walks the path of each row on its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kernels.paged_attention import StepPlan
from foveate.kernels.paged_attention.tiles import KV_CHUNK, Tiles, tiles_of
from foveate.rollout.layer_groups import LayerGroups
from foveate.rollout.planner import Planner
from foveate.rollout.processor import Prompt
from foveate.rollout.pruners.protocol import Stage
from foveate.rollout.scheduler import Group, Sequence
from foveate.rollout.segments import Chunk, Segment
from foveate.rollout.types import Request

# (pages, kv_len, depth, causal) -> rows
Visits = dict[tuple[tuple[int, ...], int, int, bool], list[int]]
CPU = torch.device("cpu")
PROMPT = Prompt(torch.zeros(1, dtype=torch.int64), torch.zeros((3, 1), dtype=torch.int64), 1, (), (1,))


def tables(*numbers: int) -> tuple[np.ndarray]:
    """The tables of a segment of one layer group and one block."""
    return (np.array([numbers], np.int32),)


def visits_of(plan: StepPlan) -> Visits:
    """The plan's arrays read back, after a check of types, lengths and offsets; no segment is visited twice."""
    dtypes = {"visit_pages": np.int32, "visit_page_offsets": np.int32, "visit_kv_len": np.int32, "visit_rows": np.int32}
    dtypes |= {"visit_row_offsets": np.int32, "visit_depth": np.int32, "visit_causal": np.bool_}
    for name, dtype in dtypes.items():
        array = getattr(plan, name)
        assert array.dtype == dtype, name
        assert array.ndim == 1, name
    assert plan.slots.dtype == torch.int64
    count = len(plan.visit_kv_len)
    assert plan.num_visits == count == len(plan.visit_depth) == len(plan.visit_causal)
    assert plan.num_rows == len(plan.slots)
    for offsets, items in ((plan.visit_page_offsets, plan.visit_pages), (plan.visit_row_offsets, plan.visit_rows)):
        assert len(offsets) == count + 1
        assert (offsets[0], offsets[-1]) == (0, len(items))
        assert (np.diff(offsets) > 0).all()
    assert plan.visit_depth.tolist() == sorted(plan.visit_depth.tolist())
    visits: Visits = {}
    for v in range(count):
        pages = plan.visit_pages[plan.visit_page_offsets[v] : plan.visit_page_offsets[v + 1]]
        rows = plan.visit_rows[plan.visit_row_offsets[v] : plan.visit_row_offsets[v + 1]]
        assert np.array_equal(pages, plan.pages_of(v))
        assert np.array_equal(rows, plan.rows_of(v))
        key = (tuple(pages.tolist()), *(array[v].item() for array in _per_visit(plan)))
        assert key not in visits, "one visit serves all rows"
        visits[key] = rows.tolist()
    return visits


def _per_visit(plan: StepPlan) -> tuple[np.ndarray, ...]:
    return plan.visit_kv_len, plan.visit_depth, plan.visit_causal


def expected_visits(rows: Iterable[Segment], kv_len: dict[Segment, int]) -> Visits:
    """rows: each row's own segment. kv_len: tokens of each segment that this step's rows may see."""
    visits: Visits = {}
    for row, own in enumerate(rows):
        above, segment = [], own
        while segment.parent is not None:
            segment = segment.parent
            above.append(segment)
        for distance, segment in enumerate(above, 1):
            key = (tuple(segment.pages), kv_len[segment], len(above) - distance, False)
            visits.setdefault(key, []).append(row)
        visits.setdefault((tuple(own.pages), kv_len[own], len(above), True), []).append(row)
    return visits


def expected_slots(segment: Segment, first: int, count: int, page_size: int) -> list[int]:
    """Every slot of the segment in token order, spelled out, then a part of them."""
    slots = [page * page_size + offset for page in segment.pages for offset in range(page_size)]
    return slots[first : first + count]


class Forest:
    """Random segments with pages of their own; completions may hold a page more than their tokens need."""

    def __init__(self, page_size: int, seed: int):
        self.page_size = page_size
        self.rng = np.random.default_rng(seed)
        self.pages = self.rng.permutation(1000).tolist()

    def segment(self, parent: Segment | None, length: int, spare_pages: int = 0) -> Segment:
        count = -(-length // self.page_size) + spare_pages
        pages = [self.pages.pop() for _ in range(count)]
        start = int(self.rng.integers(0, 50))
        return Segment(parent, identity=None, tables=tables(*pages), length=length, span=(start, start + length))

    def prompt(self, parents: list[int | None], lengths: list[int]) -> list[Segment]:
        segments: list[Segment] = []
        for parent, length in zip(parents, lengths, strict=True):
            segments.append(self.segment(None if parent is None else segments[parent], length))
        return segments


@st.composite
def forests(draw: st.DrawFn) -> tuple[Forest, list[Segment]]:
    """A forest of prompt segments, parents first, up to 4 levels deep."""
    forest = Forest(draw(st.sampled_from([1, 2, 3, 8, 64])), draw(st.integers(0, 2**16)))
    size = forest.page_size
    count = draw(st.integers(1, 8))
    parents = [draw(st.sampled_from([None, *range(max(0, index - 3), index)])) for index in range(count)]
    lengths = [draw(st.sampled_from([1, size, size + 1, max(1, size - 1), 3 * size, 7])) for _ in range(count)]
    return forest, forest.prompt(parents, lengths)


@given(forests(), st.data())
def test_prefill(built, data):
    """Any subset of the forest gets a chunk, whole or in part; the rest was computed before."""
    forest, segments = built
    chosen = data.draw(st.sets(st.sampled_from(range(len(segments))), min_size=1))
    chunks = []
    for index in sorted(chosen):
        segment = segments[index]
        start = data.draw(st.sampled_from([0, segment.length // 2, segment.length - 1]))
        segment.length = data.draw(st.sampled_from([start + 1, segment.length]))
        chunks.append(Chunk(segment, start, segment.length))
    (plan,) = Planner(forest.page_size, CPU).prefill(chunks)
    rows = [chunk.segment for chunk in chunks for _ in range(chunk.start, chunk.stop)]
    assert visits_of(plan) == expected_visits(rows, {segment: segment.length for segment in segments})
    slots = [slot for s, start, stop in chunks for slot in expected_slots(s, start, stop - start, forest.page_size)]
    assert plan.slots.tolist() == slots
    assert plan.page_size == forest.page_size


def group_at(path_end: Segment) -> Group:
    return Group(Request([0]), "", PROMPT, 100, frozenset(), None, None, path=path_end.path())


def running(forest: Forest, path_end: Segment, lengths: Iterable[int]) -> list[Sequence]:
    """A group below a prompt segment; its samples have `length` tokens stored and room for one more."""
    group = group_at(path_end)
    for length in lengths:
        leaf = forest.segment(path_end, length, spare_pages=int(length % forest.page_size == 0))
        group.sequences.append(Sequence(group, seed=0, leaf=leaf))
    return group.sequences


@settings(max_examples=150)
@given(forests(), st.data())
def test_decode(built, data):
    """Groups below any prompt segments, some sharing all or part of their path, in any order of rows."""
    forest, segments = built
    sequences: list[Sequence] = []
    for end in data.draw(st.lists(st.sampled_from(segments), min_size=1, max_size=4)):
        sequences += running(
            forest, end, data.draw(st.lists(st.integers(0, 2 * forest.page_size), min_size=1, max_size=4))
        )
    sequences = data.draw(st.permutations(sequences))
    (plan,) = Planner(forest.page_size, CPU).decode(sequences)
    leaves = [sequence.leaf for sequence in sequences]
    lengths = {s: s.length for s in segments} | {leaf: leaf.length + 1 for leaf in leaves}
    expected = {key: sorted(rows) for key, rows in expected_visits(leaves, lengths).items()}
    assert {key: sorted(rows) for key, rows in visits_of(plan).items()} == expected
    assert plan.slots.tolist() == [expected_slots(s, s.length, 1, forest.page_size)[0] for s in leaves]
    assert len(set(plan.slots.tolist())) == len(sequences)
    assert all(slot // forest.page_size in leaf.pages for slot, leaf in zip(plan.slots.tolist(), leaves, strict=True))


BLOCKS = LayerGroups(5, (Stage(2, 0.5, "before"),))  # groups of 2 and 3 blocks
ARRAYS = [field.name for field in dataclasses.fields(StepPlan) if field.name.startswith("visit_")]


class Samples:
    """Running samples of two groups of different depth, with pages of all blocks, step after step."""

    def __init__(self, page_size: int):
        self.page_size, self.pages = page_size, itertools.count()
        root = self.segment(None, 3)
        self.groups = [group_at(root), group_at(self.segment(root, 5))]
        self.running: list[Sequence] = []

    def segment(self, parent: Segment | None, length: int) -> Segment:
        segment = Segment(parent, None, tables=tuple(self.more(len(own), 0) for own in BLOCKS.blocks), length=length)
        self.grow(segment, -(-length // self.page_size))
        return segment

    def more(self, blocks: int, count: int) -> np.ndarray:
        return np.array([[next(self.pages) for _ in range(count)] for _ in range(blocks)], np.int32).reshape(blocks, -1)

    def grow(self, segment: Segment, count: int) -> None:
        tables = (np.hstack([table, self.more(len(table), count)]) for table in segment.tables)
        segment.tables = tuple(tables)

    def start(self, group: int, length: int, place: int) -> None:
        leaf = self.segment(self.groups[group].path[-1], length)
        self.running.insert(place, Sequence(self.groups[group], leaf=leaf))

    def step(self, spare: int) -> None:
        """Room for one more token; the first sample takes `spare` pages more than it needs now."""
        for index, sequence in enumerate(self.running):
            leaf = sequence.leaf
            full = leaf.length == leaf.tables[0].shape[1] * self.page_size
            if count := int(full) + (0 if index else spare):
                self.grow(leaf, count)


@given(st.data())
def test_a_step_after_others(data):
    """Samples start, end, change places and take pages: the plans are those of a planner that knows no step before."""
    samples = Samples(data.draw(st.sampled_from([1, 2, 3])))
    planner = Planner(samples.page_size, CPU, BLOCKS)
    made: list[tuple[StepPlan, dict[str, list]]] = []
    for _ in range(data.draw(st.integers(2, 8))):
        for _ in range(data.draw(st.sampled_from([0, 0, 0, 1, 3]))):
            place = data.draw(st.integers(0, len(samples.running)))
            samples.start(data.draw(st.integers(0, 1)), data.draw(st.integers(0, 4)), place)
        if samples.running and data.draw(st.sampled_from([False, False, True])):
            samples.running.pop(data.draw(st.integers(0, len(samples.running) - 1)))
        if data.draw(st.sampled_from([False, False, True])):
            samples.running = data.draw(st.permutations(samples.running))
        samples.step(data.draw(st.sampled_from([0, 0, 2])))
        plans, fresh = planner.decode(samples.running), Planner(samples.page_size, CPU, BLOCKS).decode(samples.running)
        assert [contents(plan) for plan in plans] == [contents(plan) for plan in fresh]
        leaves = [sequence.leaf for sequence in samples.running]
        for plan, pages in zip(
            plans, zip(*(map(list, all_blocks(leaf)) for leaf in leaves), strict=True), strict=False
        ):
            every = [[page * samples.page_size + i for page in own for i in range(samples.page_size)] for own in pages]
            assert plan.slots.tolist() == [slots[leaf.length] for slots, leaf in zip(every, leaves, strict=True)]
        for leaf in leaves:
            leaf.length += 1
        made += [(plan, contents(plan)) for plan in plans]
    assert all(contents(plan) == before for plan, before in made), "a plan that was handed out stays as it was"


GROUP_SIZE = 7  # query heads of a KV head: three rows are more columns than a tile has


@settings(max_examples=60)
@given(st.data())
def test_tiles_after_other_steps(data):
    """What attention keeps from step to step, with chunks begun, pages taken and samples that start, end or are
    aborted, is to the bit what it makes for a plan that was made anew."""
    samples = Samples(data.draw(st.sampled_from([64, 100])))
    planner = Planner(samples.page_size, CPU, BLOCKS)
    prompt = samples.groups[1].path[-1]
    samples.grow(prompt, 8)
    # Of its tokens, the layers of the second group hold fewer than a chunk.
    prompt.length, prompt.tail, prompt.held = KV_CHUNK + 3, SimpleNamespace(is_complete=True), (KV_CHUNK + 3, 40)
    lengths = st.sampled_from([0, 1, 62, KV_CHUNK - 3, KV_CHUNK - 1, KV_CHUNK, 2 * KV_CHUNK - 2])
    kept: list[tuple[Tiles, list]] = []
    for _ in range(data.draw(st.integers(2, 8))):
        change = data.draw(st.sampled_from(["none", "none", "none", "start", "end", "abort", "move"]))
        if change == "start" or not samples.running:
            group = data.draw(st.integers(0, 1))
            for length in data.draw(st.lists(lengths, min_size=1, max_size=4)):
                samples.start(group, length, data.draw(st.integers(0, len(samples.running))))
        elif change == "end":
            samples.running.pop(data.draw(st.integers(0, len(samples.running) - 1)))
        elif change == "abort":
            ended = samples.running[0].group
            samples.running = [sequence for sequence in samples.running if sequence.group is not ended]
        elif change == "move":
            samples.running = data.draw(st.permutations(samples.running))
        samples.step(0)
        plans, fresh = planner.decode(samples.running), Planner(samples.page_size, CPU, BLOCKS).decode(samples.running)
        made = [tiles_of(plan, GROUP_SIZE, 1 << 30, CPU) for plan in plans]
        assert [*map(bits, made)] == [bits(tiles_of(plan, GROUP_SIZE, 1 << 30, CPU)) for plan in fresh]
        kept += [(tiles, bits(tiles)) for tiles in made]
        for sequence in samples.running:
            sequence.leaf.length += 1
    assert all(bits(tiles) == before for tiles, before in kept), "tiles of an earlier step stay as they were"


def bits(tiles: Tiles) -> list:
    """Every field; tensors with their types, which are all those of the kernels."""
    values = [getattr(tiles, field.name) for field in dataclasses.fields(tiles)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert all(value.dtype == torch.int32 and value.is_contiguous() for value in tensors)
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]


def all_blocks(segment: Segment) -> list[list[int]]:
    return [pages for table in segment.tables for pages in table.tolist()]


def contents(plan: StepPlan) -> dict[str, list]:
    arrays = {name: getattr(plan, name) for name in ARRAYS}
    types = {name: array.dtype.name for name, array in arrays.items()}
    assert plan.slots.is_contiguous()
    assert all(array.flags.c_contiguous for array in arrays.values())
    return {"slots": plan.slots.tolist(), "types": types, **{name: array.tolist() for name, array in arrays.items()}}


def test_prefill_by_hand():
    """Two children of one prefix in one step, as arrays written down."""
    prefix = Segment(None, None, tables=tables(4, 2), length=3, span=(0, 3))
    left = Segment(prefix, None, tables=tables(0), length=1, span=(3, 4))
    right = Segment(prefix, None, tables=tables(7), length=2, span=(3, 5))
    (plan,) = Planner(2, CPU).prefill([Chunk(segment, 0, segment.length) for segment in (prefix, left, right)])
    assert plan.slots.tolist() == [8, 9, 4, 0, 14, 15]
    assert plan.visit_depth.tolist() == [0, 0, 1, 1]
    assert visits_of(plan) == {
        ((4, 2), 3, 0, True): [0, 1, 2],
        ((4, 2), 3, 0, False): [3, 4, 5],
        ((0,), 1, 1, True): [3],
        ((7,), 2, 1, True): [4, 5],
    }


def test_prefill_plans_of_every_block_lie_one_element_after_another():
    pages = tuple(np.array([[4, 2], [0, 1]], np.int32) + 5 * group for group in range(BLOCKS.count))
    blocks = [len(own) for own in BLOCKS.blocks]
    pages = tuple(np.resize(table, (count, 2)) for table, count in zip(pages, blocks, strict=True))
    segment = Segment(None, None, tables=pages, length=3, span=(0, 3))
    for group, count in enumerate(blocks):
        plans = Planner(2, CPU, BLOCKS).prefill([Chunk(segment, 0, 3)], group)
        assert len(plans) == count
        for plan, (first, second) in zip(plans, pages[group].tolist(), strict=True):
            assert contents(plan)["slots"] == [2 * first, 2 * first + 1, 2 * second]


def test_the_last_chunk_of_a_prompt_by_hand():
    """Five tokens were stored; the two that follow see all of them, and the sample's own stored tokens come below."""
    prefix = Segment(None, None, tables=tables(4), length=2, span=(0, 2))
    long = Segment(prefix, None, tables=tables(1, 0, 6, 7), length=7, span=(2, 9))
    leaf = Segment(long, None, tables=tables(9), length=1, prompt=PROMPT, span=(0, 1))
    (plan,) = Planner(2, CPU).prefill([Chunk(long, 5, 7), Chunk(leaf, 0, 1)])
    assert plan.slots.tolist() == [13, 14, 18]
    assert visits_of(plan) == {
        ((4,), 2, 0, False): [0, 1, 2],
        ((1, 0, 6, 7), 7, 1, True): [0, 1],
        ((1, 0, 6, 7), 7, 1, False): [2],
        ((9,), 1, 2, True): [2],
    }


def test_decode_by_hand():
    """Two groups on one prefix, one with a prompt of its own below it."""
    prefix = Segment(None, None, tables=tables(5, 1), length=4)
    own = Segment(prefix, None, tables=tables(3), length=1)
    short, long = group_at(prefix), group_at(own)
    leaves = [
        (short, Segment(prefix, None, tables=tables(8), length=1)),
        (long, Segment(own, None, tables=tables(9, 6), length=2)),
        (long, Segment(own, None, tables=tables(0), length=0)),
    ]
    (plan,) = Planner(2, CPU).decode([Sequence(group, 0, leaf=leaf) for group, leaf in leaves])
    assert plan.slots.tolist() == [17, 12, 0]
    assert plan.visit_depth.tolist() == [0, 1, 1, 2, 2]
    assert visits_of(plan) == {
        ((5, 1), 4, 0, False): [0, 1, 2],
        ((3,), 1, 1, False): [1, 2],
        ((8,), 2, 1, True): [0],
        ((9, 6), 3, 2, True): [1],
        ((0,), 1, 2, True): [2],
    }


def test_decode_of_no_sequence():
    (plan,) = Planner(4, CPU).decode([])
    assert (plan.num_rows, plan.num_visits) == (0, 0)
    assert plan.visit_page_offsets.tolist() == plan.visit_row_offsets.tolist() == [0]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_decode_writes_behind_what_is_stored(length):
    """At the start, the middle and the end of a page."""
    prefix = Segment(None, None, tables=tables(0), length=1)
    (sequence,) = running(Forest(2, 0), prefix, [length])
    (plan,) = Planner(2, CPU).decode([sequence])
    pages = sequence.leaf.pages
    assert plan.slots.tolist() == [[2 * pages[0]], [2 * pages[0] + 1], [2 * pages[-1]]][length]


def test_position_of_the_token_fed_next():
    """The first drawn token stands right behind the prompt."""
    sequence = Sequence(group_at(Segment(None, None)), seed=0, token_ids=[7])
    assert sequence.next_position == PROMPT.next_position
    sequence.token_ids.append(7)
    assert sequence.next_position == PROMPT.next_position + 1
