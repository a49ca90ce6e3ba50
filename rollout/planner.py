"""From segments and sequences to the flat arrays of a step (`StepPlan`)."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from foveate.kernels.paged_attention import StepPlan
from foveate.rollout.scheduler import Sequence
from foveate.rollout.segments import Chunk, Segment


class Planner:
    """Plans prefill over chunks of segments and decode over running sequences."""

    def __init__(self, page_size: int, device: torch.device):
        self.page_size = page_size
        self.device = device

    def prefill(self, chunks: list[Chunk]) -> StepPlan:
        """Rows are the tokens of the chunks, in order; parents stand before their children.

        The length of a segment is what it is once this step's keys are stored.
        """
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        starts = [0, *accumulate(lengths)]
        visits = _Visits()
        slots = []
        for chunk, start, length in zip(chunks, starts, lengths, strict=False):
            rows = range(start, start + length)
            path = chunk.segment.path()
            for depth, ancestor in enumerate(path[:-1]):
                visits.add(ancestor, ancestor.length, depth, rows)
            visits.add(chunk.segment, chunk.stop, len(path) - 1, rows, causal=True)
            slots.append(self._slots(chunk.segment.pages, np.arange(chunk.start, chunk.stop)))
        return visits.plan(self._to_device(np.concatenate(slots)), self.page_size)

    def decode(self, sequences: list[Sequence]) -> StepPlan:
        """Row r is the last drawn token of sequences[r], stored at the end of its leaf."""
        visits = _Visits()
        rows_below: dict[int, list[int]] = {}
        groups: dict[int, Sequence] = {}
        for row, sequence in enumerate(sequences):
            rows_below.setdefault(id(sequence.group), []).append(row)
            groups[id(sequence.group)] = sequence
        for key, rows in rows_below.items():
            for depth, segment in enumerate(groups[key].group.path):
                visits.add(segment, segment.length, depth, rows)
        pages, offsets = np.empty(len(sequences), np.int64), np.empty(len(sequences), np.int64)
        for row, sequence in enumerate(sequences):
            leaf = sequence.leaf
            assert leaf is not None, sequence.group.request_id
            page, offsets[row] = divmod(leaf.length, self.page_size)
            pages[row] = leaf.pages[page]
            visits.add(leaf, leaf.length + 1, len(sequence.group.path), (row,), causal=True)
        return visits.plan(self._to_device(pages * self.page_size + offsets), self.page_size)

    def _slots(self, pages: list[int], tokens: np.ndarray) -> np.ndarray:
        return np.asarray(pages, np.int64)[tokens // self.page_size] * self.page_size + tokens % self.page_size

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class _Visits:
    """Collects which rows visit which segment; a segment is visited once, by all rows below it."""

    def __init__(self) -> None:
        self.segments: dict[tuple[int, bool], tuple[Segment, int, int, bool]] = {}
        self.rows: dict[tuple[int, bool], list[int]] = {}

    def add(self, segment: Segment, kv_len: int, depth: int, rows, causal: bool = False) -> None:
        key = (id(segment), causal)
        self.segments[key] = (segment, kv_len, depth, causal)
        self.rows.setdefault(key, []).extend(rows)

    def plan(self, slots: torch.Tensor, page_size: int) -> StepPlan:
        order = sorted(self.segments, key=lambda key: self.segments[key][2])  # by depth, stable
        visits = [self.segments[key] for key in order]
        pages = [visit[0].pages for visit in visits]
        rows = [self.rows[key] for key in order]
        return StepPlan(
            slots=slots,
            visit_pages=_concat(pages),
            visit_page_offsets=_offsets(pages),
            visit_kv_len=np.array([visit[1] for visit in visits], np.int32),
            visit_rows=_concat(rows),
            visit_row_offsets=_offsets(rows),
            visit_depth=np.array([visit[2] for visit in visits], np.int32),
            visit_causal=np.array([visit[3] for visit in visits], bool),
            page_size=page_size,
        )


def _concat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter((item for items in lists for item in items), np.int32, count=sum(map(len, lists)))


def _offsets(lists: list[list[int]]) -> np.ndarray:
    return np.array([0, *accumulate(map(len, lists))], np.int32)
