"""From segments and sequences to the flat arrays of a step (`StepPlan`)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
import torch

from foveate.kernels.paged_attention import StepPlan
from foveate.rollout.layer_groups import ONE_GROUP, LayerGroups
from foveate.rollout.scheduler import Sequence
from foveate.rollout.segments import Chunk, Segment


class Planner:
    """Plans prefill over chunks of segments and decode over running sequences.

    A plan is for one block of layers; those of a layer group differ in pages and slots alone.
    """

    def __init__(self, page_size: int, device: torch.device, groups: LayerGroups = ONE_GROUP):
        self.page_size = page_size
        self.device = device
        self.groups = groups

    def prefill(self, chunks: list[Chunk], group: int = 0) -> list[StepPlan]:
        """One plan for each block of a layer group. Rows are the tokens of the chunks, in order, as the group counts
        them; parents stand before their children.

        The length of a segment is what it is once this step's keys are stored.
        """
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        starts = [0, *accumulate(lengths)]
        visits = _Visits()
        for chunk, start, length in zip(chunks, starts, lengths, strict=False):
            rows = range(start, start + length)
            path = chunk.segment.path()
            for depth, ancestor in enumerate(path[:-1]):
                visits.add(ancestor, ancestor.stored(group), depth, rows)
            visits.add(chunk.segment, chunk.stop, len(path) - 1, rows, causal=True)
        plans = []
        for block in self.groups.blocks[group]:
            slots = [self.slots(c.segment.tables[block], np.arange(c.start, c.stop)) for c in chunks]
            plans.append(visits.plan(block, self._to_device(np.concatenate(slots)), self.page_size))
        return plans

    def decode(self, sequences: list[Sequence]) -> list[StepPlan]:
        """One plan for each block. Row r is the last drawn token of sequences[r], stored at the end of its leaf."""
        rows_below: dict[int, list[int]] = {}
        paths: dict[int, list[Segment]] = {}
        for row, sequence in enumerate(sequences):
            rows_below.setdefault(id(sequence.group), []).append(row)
            paths[id(sequence.group)] = sequence.group.path
        leaves = [sequence.leaf for sequence in sequences if sequence.leaf is not None]
        assert len(leaves) == len(sequences), "who decodes has a segment of its own"
        plans = []
        for group, blocks in enumerate(self.groups.blocks):
            visits = _Visits()
            for key, rows in rows_below.items():
                for depth, segment in enumerate(paths[key]):
                    visits.add(segment, segment.stored(group), depth, rows)
            for row, (sequence, leaf) in enumerate(zip(sequences, leaves, strict=True)):
                visits.add(leaf, leaf.length + 1, len(sequence.group.path), (row,), causal=True)
            plans += [visits.plan(block, self._next_slots(leaves, block), self.page_size) for block in blocks]
        return plans

    def slots(self, pages: list[int], tokens: np.ndarray) -> np.ndarray:
        """int64, pool slots of tokens of a segment, by its table of one block."""
        return np.asarray(pages, np.int64)[tokens // self.page_size] * self.page_size + tokens % self.page_size

    def _next_slots(self, leaves: list[Segment], block: int) -> torch.Tensor:
        """int64, where each leaf's next token goes."""
        size = self.page_size
        slots = [leaf.tables[block][leaf.length // size] * size + leaf.length % size for leaf in leaves]
        return self._to_device(np.array(slots, np.int64))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class _Visits:
    """Collects which rows visit which segment; a segment is visited once, by all rows below it."""

    def __init__(self) -> None:
        self.segments: dict[tuple[int, bool], tuple[Segment, int, int, bool]] = {}
        self.rows: dict[tuple[int, bool], list[int]] = {}
        self.visits: list[tuple[Segment, int, int, bool]] = []  # in the plans' order
        self.first: StepPlan | None = None

    def add(self, segment: Segment, kv_len: int, depth: int, rows, causal: bool = False) -> None:
        key = (id(segment), causal)
        self.segments[key] = (segment, kv_len, depth, causal)
        self.rows.setdefault(key, []).extend(rows)

    def plan(self, block: int, slots: torch.Tensor, page_size: int) -> StepPlan:
        """The plan of one block; the arrays that all blocks share are made once."""
        if self.first is not None:
            pages = _concat([visit[0].tables[block] for visit in self.visits])
            return replace(self.first, slots=slots, visit_pages=pages, prepared=None, like=self.first)
        order = sorted(self.segments, key=lambda key: self.segments[key][2])  # by depth, stable
        visits = self.visits = [self.segments[key] for key in order]
        tables = [visit[0].tables[block] for visit in visits]
        rows = [self.rows[key] for key in order]
        self.first = StepPlan(
            slots=slots,
            visit_pages=_concat(tables),
            visit_page_offsets=_offsets(tables),
            visit_kv_len=np.array([visit[1] for visit in visits], np.int32),
            visit_rows=_concat(rows),
            visit_row_offsets=_offsets(rows),
            visit_depth=np.array([visit[2] for visit in visits], np.int32),
            visit_causal=np.array([visit[3] for visit in visits], bool),
            page_size=page_size,
        )
        return self.first


def _concat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.int32, count=sum(map(len, lists)))


def _offsets(lists: list[list[int]]) -> np.ndarray:
    return np.array([0, *accumulate(map(len, lists))], np.int32)
