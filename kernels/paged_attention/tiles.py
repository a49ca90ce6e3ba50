"""A step plan as the compiled kernels take it: tiles of (query row, head) pairs against chunks of keys.

A row's partial results, one for each chunk of each segment on its path, lie side by side and in that order, so that
merging them needs no search. Chunks are counted from the start of a segment: which tiles there are changes nothing
about a row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from foveate import _C
from foveate.kernels.dispatch import require
from foveate.kernels.paged_attention.plan import StepPlan

SHARED = ("visit_page_offsets", "visit_kv_len", "visit_rows", "visit_row_offsets", "visit_depth", "visit_causal")
KV_CHUNK, COLUMNS = _C.ATTENTION_CHUNK_KEYS, _C.ATTENTION_TILE_COLUMNS


@dataclass(frozen=True)
class Tiles:
    """int32, on the device of the queries.

    pages, rows: those of the plan. tiles: [N, 6], see csrc/paged_attention.h. row_parts: [len(rows)], the first part
    of each row in its visit. part_offsets: [T + 1], parts of each row; num_parts: of all. last_page: the largest page.
    """

    pages: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor
    row_parts: torch.Tensor
    part_offsets: torch.Tensor
    num_parts: int
    last_page: int


@dataclass(frozen=True)
class _Runs:
    """Runs of rows of a visit that see the same keys: a visit's rows, or in a causal one each by itself.

    visit, entry, size: int64 [R], the visit of a run, its first row among those of all visits, how many they are.
    unseen: int64 [R], keys of the visit behind those that the run sees. rows: int32, those of the plan, on the device.
    by_row: int64 [len(rows)], places in `rows`, sorted by row.
    """

    visit: np.ndarray
    entry: np.ndarray
    size: np.ndarray
    unseen: np.ndarray
    rows: torch.Tensor
    by_row: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """The tiles of runs that see so many chunks, whatever keys are in the last one and wherever they lie.

    chunks: int64 [R]. run, visit: int64 [N], of each tile. tiles: int32 [N, 6] without pages and keys. The rest is that
    of `Tiles`.
    """

    runs: _Runs
    chunks: np.ndarray
    run: np.ndarray
    visit: np.ndarray
    tiles: np.ndarray
    row_parts: torch.Tensor
    part_offsets: torch.Tensor
    num_parts: int


def tiles_of(plan: StepPlan, group: int, num_pages: int, device: torch.device) -> Tiles:
    """The plan's tiles, made once. group: query heads of one KV head. num_pages: of the pool.

    What plans of several steps have in common is made once for all of them. Raises ValueError for pages, rows or
    lengths that do not fit.
    """
    key = ("tiles", group, device)
    tiles = plan.prepared.get(key)
    if tiles is None:
        like = None if plan.like is None else plan.like.prepared.get(key)
        if like is None:
            tiles = _prepare(plan, group, device)
        else:
            assert _differs_in_pages_alone(plan, plan.like), "plans that are alike"
            tiles = replace(like, **_pages(plan, device))
        plan.prepared[key] = tiles
    fits = tiles.last_page < num_pages
    require(fits, f"pages in [0, {num_pages})", tiles.last_page, "visit_pages")
    return tiles


def _differs_in_pages_alone(plan: StepPlan, like: StepPlan | None) -> bool:
    assert like is not None, "whose tiles are taken over"
    same = all(getattr(plan, name) is getattr(like, name) for name in SHARED)
    return same and len(plan.visit_pages) == len(like.visit_pages)


def _prepare(plan: StepPlan, group: int, device: torch.device) -> Tiles:
    by_rows = plan.visit_rows, plan.visit_row_offsets, plan.visit_causal
    runs = _kept(plan, ("runs", plan.num_rows, device), by_rows, lambda: _runs(plan, device))
    _check_lengths(plan)
    seen = plan.visit_kv_len[runs.visit] - runs.unseen
    chunks = -(-seen // KV_CHUNK)
    layout = plan.lasting.get(("layout", group, device))
    if layout is None or layout.runs is not runs or not np.array_equal(layout.chunks, chunks):
        layout = plan.lasting["layout", group, device] = _layout(plan, runs, chunks, group, device)
    tiles = layout.tiles.copy()
    tiles[:, 0] = plan.visit_page_offsets[layout.visit]
    tiles[:, 2] = np.minimum(KV_CHUNK, seen[layout.run] - tiles[:, 1])
    return Tiles(
        **_pages(plan, device),
        rows=runs.rows,
        tiles=_on(device, tiles),
        row_parts=layout.row_parts,
        part_offsets=layout.part_offsets,
        num_parts=layout.num_parts,
    )


def _runs(plan: StepPlan, device: torch.device) -> _Runs:
    _check_rows(plan)
    num_rows = np.diff(plan.visit_row_offsets).astype(np.int64)
    causal = plan.visit_causal & (num_rows > 1)
    visit, place = _ranges(np.where(causal, num_rows, np.minimum(num_rows, 1)))
    alone = causal[visit]
    return _Runs(
        visit=visit,
        entry=plan.visit_row_offsets[visit] + np.where(alone, place, 0),
        size=np.where(alone, 1, num_rows[visit]),
        unseen=np.where(alone, num_rows[visit] - 1 - place, 0),
        rows=_on(device, plan.visit_rows),
        by_row=plan.visit_rows.argsort(kind="stable"),
    )


def _layout(plan: StepPlan, runs: _Runs, chunks: np.ndarray, group: int, device: torch.device) -> _Layout:
    # A tile for each chunk of a run and each COLUMNS of its columns.
    column_tiles = -(-runs.size * group // COLUMNS)
    run, place = _ranges(chunks * column_tiles)
    tiles = np.zeros((len(run), 6), np.int32)
    tiles[:, 1] = place // column_tiles[run] * KV_CHUNK
    tiles[:, 3] = runs.entry[run]
    tiles[:, 4] = place % column_tiles[run] * COLUMNS
    tiles[:, 5] = np.minimum(COLUMNS, runs.size[run] * group - tiles[:, 4])
    entry_chunks = np.repeat(chunks, runs.size)  # of each row in its visit
    row_parts = np.empty_like(entry_chunks)
    row_parts[runs.by_row] = entry_chunks[runs.by_row].cumsum() - entry_chunks[runs.by_row]
    ends = np.bincount(plan.visit_rows, entry_chunks, plan.num_rows).cumsum()
    return _Layout(
        runs=runs,
        chunks=chunks,
        run=run,
        visit=runs.visit[run],
        tiles=tiles,
        row_parts=_on(device, row_parts),
        part_offsets=_on(device, np.concatenate([[0], ends])),
        num_parts=int(entry_chunks.sum()),
    )


def _pages(plan: StepPlan, device: torch.device) -> dict[str, Any]:
    def copied() -> dict[str, Any]:
        lowest = int(plan.visit_pages.min(initial=0))
        require(lowest >= 0, "pages >= 0", lowest, "visit_pages")
        return {"pages": _on(device, plan.visit_pages), "last_page": int(plan.visit_pages.max(initial=-1))}

    return _kept(plan, ("pages", device), (plan.visit_pages,), copied)


def _kept(plan: StepPlan, name: tuple, arrays: tuple[np.ndarray, ...], make: Callable[[], Any]) -> Any:
    """What make() gave for these very arrays the last time it was asked."""
    known, found = plan.lasting.get(name, ((), None))
    if len(known) != len(arrays) or any(map(operator.is_not, known, arrays)):
        found = make()
        plan.lasting[name] = arrays, found
    return found


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A copy: what was checked does not change with the plan."""
    return torch.tensor(array, dtype=torch.int32, device=device)


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The concatenation of range(count) of each count: whose it is, and the number. int64 [sum of counts] both"""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def _check_rows(plan: StepPlan) -> None:
    beyond = plan.visit_rows[(plan.visit_rows < 0) | (plan.visit_rows >= plan.num_rows)]
    require(not len(beyond), f"rows in [0, {plan.num_rows})", beyond[:1].tolist(), "visit_rows")
    _check_offsets(plan, "visit_row_offsets", len(plan.visit_rows))


def _check_lengths(plan: StepPlan) -> None:
    _check_offsets(plan, "visit_page_offsets", len(plan.visit_pages))
    counts, kv_len = np.diff(plan.visit_row_offsets), plan.visit_kv_len
    room = np.diff(plan.visit_page_offsets) * plan.page_size
    fits = (kv_len <= room) & (kv_len >= np.where(plan.visit_causal, counts, 0))
    if not fits.all():
        expected = "lengths from the number of causal rows to the room in the pages"
        require(False, expected, kv_len[~fits].tolist(), "visit_kv_len")


def _check_offsets(plan: StepPlan, name: str, items: int) -> None:
    offsets = getattr(plan, name)
    fits = len(offsets) == plan.num_visits + 1 and offsets[0] == 0 and offsets[-1] == items
    if not (fits and (np.diff(offsets) >= 0).all()):
        require(False, f"{plan.num_visits + 1} ascending offsets from 0 to {items}", offsets.tolist(), name)
