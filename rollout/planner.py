"""From segments and sequences to the flat arrays of a step (`StepPlan`)."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch

from foveate.kernels.paged_attention import StepPlan
from foveate.rollout.layer_groups import ONE_GROUP, LayerGroups
from foveate.rollout.scheduler import Sequence as Sample
from foveate.rollout.segments import Chunk, Segment, Tables


class Planner:
    """Plans prefill over chunks of segments and decode over running sequences.

    A plan is for one block of layers; those of a layer group differ in pages and slots alone. The arrays of all blocks
    are made at once, and their slots go to the device in one copy.
    """

    def __init__(self, page_size: int, device: torch.device, groups: LayerGroups = ONE_GROUP):
        self.page_size = page_size
        self.device = device
        self.groups = groups
        self._running = _Running([], [], groups)

    def prefill(self, chunks: list[Chunk], group: int = 0) -> list[StepPlan]:
        """One plan for each block of a layer group. Rows are the tokens of the chunks, in order, as the group counts
        them; parents stand before their children.

        The length of a segment is what it is once this step's keys are stored.
        """
        starts = accumulate((chunk.stop - chunk.start for chunk in chunks), initial=0)
        visits = _Visits()
        for chunk, start in zip(chunks, starts, strict=False):
            rows = range(start, start + chunk.stop - chunk.start)
            path = chunk.segment.path()
            assert chunk.segment.stored(group) == chunk.stop, (chunk.segment.stored(group), chunk.stop)
            for depth, ancestor in enumerate(path[:-1]):
                visits.add(ancestor, depth, rows)
            visits.add(chunk.segment, len(path) - 1, rows, causal=True)
        slots = [self.slots(c.segment.tables[group], np.arange(c.start, c.stop)) for c in chunks]
        arrays, _ = visits.arrays({group: self.groups.blocks[group]})
        return self._plans(arrays, np.concatenate(slots, axis=1))

    def decode(self, sequences: list[Sample]) -> list[StepPlan]:
        """One plan for each block. Row r is the last drawn token of sequences[r], stored at the end of its leaf.

        What the step has in common with the one before is taken from there: all but lengths and slots as long as the
        same samples run and take no pages.
        """
        leaves = [sequence.leaf for sequence in sequences if sequence.leaf is not None]
        assert len(leaves) == len(sequences), "who decodes has a segment of its own"
        if not self._running.follow(leaves):
            self._running = _Running(sequences, leaves, self.groups)
        running = self._running
        lengths = np.array([leaf.length for leaf in leaves], np.int64)
        page, offset = np.divmod(lengths, self.page_size)
        slots = np.empty((self.groups.num_blocks, len(leaves)), np.int64)
        step = []
        for arrays, blocks in zip(running.arrays, self.groups.blocks, strict=True):
            first = arrays.page_offsets[running.own] + page
            assert (first < arrays.page_offsets[running.own + 1]).all(), "who decodes has a page for its token"
            slots[blocks.start : blocks.stop] = arrays.pages[:, first]
            kv_len = arrays.kv_len.copy()
            kv_len[running.own] = lengths + 1
            step.append(arrays._replace(kv_len=kv_len))
        slots *= self.page_size
        slots += offset
        return self._plans(step, slots)

    def slots(self, pages: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """int64 [..., T], pool slots of tokens of a segment. pages: int32 [..., pages], of one block or of several."""
        page, offset = np.divmod(tokens, self.page_size)
        return pages[..., page].astype(np.int64) * self.page_size + offset

    def _plans(self, groups: Iterable[_Arrays], slots: np.ndarray) -> list[StepPlan]:
        """slots: int64 [blocks, T], of all blocks of these layer groups."""
        rows = iter(torch.from_numpy(np.ascontiguousarray(slots)).to(self.device).unbind())
        plans: list[StepPlan] = []
        for arrays in groups:
            first = None
            for pages, lasting in zip(arrays.by_block, arrays.lasting, strict=True):
                plan = StepPlan(
                    slots=next(rows),
                    visit_pages=pages,
                    visit_page_offsets=arrays.page_offsets,
                    visit_kv_len=arrays.kv_len,
                    visit_rows=arrays.rows,
                    visit_row_offsets=arrays.row_offsets,
                    visit_depth=arrays.depth,
                    visit_causal=arrays.causal,
                    page_size=self.page_size,
                    like=first,
                    lasting=lasting,
                )
                plans.append(plan)
                first = first or plan
        return plans


class _Arrays(NamedTuple):
    """Of one layer group, the arrays of its `StepPlan`s.

    pages: int32 [blocks, pages of all visits]; by_block: its rows, the same arrays in every step. lasting: by block.
    """

    pages: np.ndarray
    by_block: list[np.ndarray]
    lasting: list[dict[Any, Any]]
    page_offsets: np.ndarray
    kv_len: np.ndarray
    rows: np.ndarray
    row_offsets: np.ndarray
    depth: np.ndarray
    causal: np.ndarray


class _Visits:
    """Collects which rows visit which segment; a segment is visited once, by all rows below it. One entry a visit."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.depths: list[int] = []
        self.causal: list[bool] = []
        self.rows: list[list[int]] = []
        self._places: dict[tuple[int, bool], int] = {}

    def add(self, segment: Segment, depth: int, rows: Iterable[int], causal: bool = False) -> None:
        place = self._places.setdefault((segment.number, causal), len(self.segments))
        if place == len(self.segments):
            self.segments.append(segment)
            self.depths.append(depth)
            self.causal.append(causal)
            self.rows.append([])
        self.rows[place].extend(rows)

    def arrays(
        self, blocks: Mapping[int, range], leaves: Sequence[Tables] = (), leaf_depths: Sequence[int] = ()
    ) -> tuple[list[_Arrays], np.ndarray]:
        """The arrays of layer groups, which are given with their blocks, and int64 [V], the place of each visit there.

        Lengths are those that are stored now. leaves: tables of further segments, of which row r visits the r-th; their
        lengths are 0.
        """
        depth = np.array([*self.depths, *leaf_depths], np.int32)
        sizes = np.array([*map(len, self.rows), *[1] * len(leaves)], np.int32)
        rows = np.fromiter(chain(chain.from_iterable(self.rows), range(len(leaves))), np.int32)
        order = np.argsort(depth, kind="stable")
        shared = _reordered(rows, sizes, order), _offsets(sizes[order]), depth[order]
        causal = np.array([*self.causal, *[True] * len(leaves)], bool)[order]
        found = []
        for group, own in blocks.items():
            tables = [*(segment.tables[group] for segment in self.segments), *(tables[group] for tables in leaves)]
            tables = [tables[place] for place in order.tolist()]
            pages = np.concatenate([np.empty((len(own), 0), np.int32), *tables], axis=1)
            kv_len = np.array([segment.stored(group) for segment in self.segments] + [0] * len(leaves), np.int32)[order]
            page_offsets = _offsets([table.shape[1] for table in tables])
            lasting: list[dict[Any, Any]] = [{} for _ in own]
            found.append(_Arrays(pages, list(pages), lasting, page_offsets, kv_len, *shared, causal))
        return found, np.argsort(order)


class _Running:
    """What decode steps of the same samples have in common; it holds no segments, only their tables.

    arrays: by layer group, with the pages of now; the lengths of the rows' own segments are left out. own: int64 [T],
    the visit of each row's own segment.
    """

    def __init__(self, sequences: Sequence[Sample], leaves: list[Segment], groups: LayerGroups):
        self._numbers = [leaf.number for leaf in leaves]
        self._tables = [leaf.tables for leaf in leaves]
        visits, rows_below = _Visits(), defaultdict(list)
        for row, sequence in enumerate(sequences):
            rows_below[sequence.group].append(row)
        for group, rows in rows_below.items():
            for depth, segment in enumerate(group.path):
                visits.add(segment, depth, rows)
        depths = [len(sequence.group.path) for sequence in sequences]
        self.arrays, places = visits.arrays(dict(enumerate(groups.blocks)), self._tables, depths)
        self.own = places[len(visits.segments) :]

    def follow(self, leaves: list[Segment]) -> bool:
        """Takes in pages that these leaves have taken. False, and nothing is changed, if they are not the same."""
        tables = [leaf.tables for leaf in leaves]
        if len(tables) == len(self._tables) and all(map(operator.is_, tables, self._tables)):
            return True
        if [leaf.number for leaf in leaves] != self._numbers:
            return False
        grown = [row for row, (new, old) in enumerate(zip(tables, self._tables, strict=True)) if new is not old]
        grown.sort(key=self.own.__getitem__)
        self.arrays = [self._with_pages(group, grown, tables) for group in range(len(self.arrays))]
        self._tables = tables
        return True

    def _with_pages(self, group: int, grown: list[int], tables: list[Tables]) -> _Arrays:
        """The arrays of a layer group when the segments of these rows, in the order of visits, have more pages."""
        arrays, visits = self.arrays[group], self.own[grown]
        added = [tables[row][group][:, self._tables[row][group].shape[1] :] for row in grown]
        parts, start = [], 0
        for end, pages in zip(arrays.page_offsets[visits + 1].tolist(), added, strict=True):
            parts += [arrays.pages[:, start:end], pages]
            start = end
        more = np.zeros_like(arrays.page_offsets)
        more[visits + 1] = [pages.shape[1] for pages in added]
        offsets = arrays.page_offsets + more.cumsum(dtype=np.int32)
        pages = np.concatenate([*parts, arrays.pages[:, start:]], axis=1)
        return arrays._replace(pages=pages, by_block=list(pages), page_offsets=offsets)


def _reordered(items: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Runs of items of these sizes, laid end to end in another order."""
    starts, sizes = (sizes.cumsum() - sizes)[order], sizes[order]
    return items[np.repeat(starts - sizes.cumsum() + sizes, sizes) + np.arange(len(items))]


def _offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
