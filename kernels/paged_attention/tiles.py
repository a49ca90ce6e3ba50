"""A step plan as the compiled kernels take it: tiles of (query row, head) pairs against chunks of keys.

A row's partial results, one for each chunk of each segment on its path, lie side by side and in that order, so that
merging them needs no search. Chunks are counted from the start of a segment: which tiles there are changes nothing
about a row.
"""

from __future__ import annotations

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


def tiles_of(plan: StepPlan, group: int, num_pages: int, device: torch.device) -> Tiles:
    """The plan's tiles, made once. group: query heads of one KV head. num_pages: of the pool.

    Raises ValueError for pages, rows or lengths that do not fit.
    """
    key = ("tiles", group, device)
    tiles = plan.prepared.get(key)
    if tiles is None:
        like = None if plan.like is None else plan.like.prepared.get(key)
        if like is None:
            _check(plan)
            tiles = _prepare(plan, group, device)
        else:
            assert _differs_in_pages_alone(plan, plan.like), "plans that are alike"
            tiles = replace(like, **_pages(plan, device))
        plan.prepared[key] = tiles
    fits = tiles.last_page < num_pages
    require(fits, f"pages in [0, {num_pages})", tiles.last_page, "visit_pages")
    return tiles


def _pages(plan: StepPlan, device: torch.device) -> dict[str, Any]:
    lowest = int(plan.visit_pages.min(initial=0))
    require(lowest >= 0, "pages >= 0", lowest, "visit_pages")
    return {"pages": _on(device, plan.visit_pages), "last_page": int(plan.visit_pages.max(initial=-1))}


def _differs_in_pages_alone(plan: StepPlan, like: StepPlan | None) -> bool:
    assert like is not None, "whose tiles are taken over"
    same = all(getattr(plan, name) is getattr(like, name) for name in SHARED)
    return same and len(plan.visit_pages) == len(like.visit_pages)


def _prepare(plan: StepPlan, group: int, device: torch.device) -> Tiles:
    # Runs of rows of a visit that see the same keys: a visit's rows, or in a causal one each by itself.
    num_rows = np.diff(plan.visit_row_offsets).astype(np.int64)
    causal = plan.visit_causal & (num_rows > 1)
    visit, place = _ranges(np.where(causal, num_rows, np.minimum(num_rows, 1)))
    alone = causal[visit]
    entry = plan.visit_row_offsets[visit] + np.where(alone, place, 0)
    rows = np.where(alone, 1, num_rows[visit])
    seen = plan.visit_kv_len[visit] - np.where(alone, num_rows[visit] - 1 - place, 0)
    chunks, parts_of_columns = -(-seen // KV_CHUNK), -(-rows * group // COLUMNS)
    # A tile for each chunk of a run and each COLUMNS of its columns.
    run, place = _ranges(chunks * parts_of_columns)
    start = place // parts_of_columns[run] * KV_CHUNK
    column = place % parts_of_columns[run] * COLUMNS
    tiles = np.stack(
        [
            plan.visit_page_offsets[visit[run]],
            start,
            np.minimum(KV_CHUNK, seen[run] - start),
            entry[run],
            column,
            np.minimum(COLUMNS, rows[run] * group - column),
        ],
        axis=1,
    )
    entry_chunks = np.repeat(chunks, rows)  # of each row in its visit
    order = plan.visit_rows.argsort(kind="stable")
    row_parts = np.empty_like(entry_chunks)
    row_parts[order] = entry_chunks[order].cumsum() - entry_chunks[order]
    ends = np.bincount(plan.visit_rows, entry_chunks, plan.num_rows).cumsum()
    return Tiles(
        **_pages(plan, device),
        rows=_on(device, plan.visit_rows),
        tiles=_on(device, tiles),
        row_parts=_on(device, row_parts),
        part_offsets=_on(device, np.concatenate([[0], ends])),
        num_parts=int(entry_chunks.sum()),
    )


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A copy: what was checked does not change with the plan."""
    return torch.tensor(array, dtype=torch.int32, device=device)


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The concatenation of range(count) of each count: whose it is, and the number. int64 [sum of counts] both"""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def _check(plan: StepPlan) -> None:
    beyond = plan.visit_rows[(plan.visit_rows < 0) | (plan.visit_rows >= plan.num_rows)]
    require(not len(beyond), f"rows in [0, {plan.num_rows})", beyond[:1].tolist(), "visit_rows")
    for name in ("visit_row_offsets", "visit_page_offsets"):
        offsets, items = getattr(plan, name), getattr(plan, name.replace("_offsets", "s"))
        fits = len(offsets) == plan.num_visits + 1 and offsets[0] == 0 and offsets[-1] == len(items)
        fits = fits and bool((np.diff(offsets) >= 0).all())
        require(fits, f"{plan.num_visits + 1} ascending offsets from 0 to {len(items)}", offsets.tolist(), name)
    counts, kv_len = np.diff(plan.visit_row_offsets), plan.visit_kv_len
    room = np.diff(plan.visit_page_offsets) * plan.page_size
    fits = (kv_len <= room) & (kv_len >= np.where(plan.visit_causal, counts, 0))
    expected = "lengths from the number of causal rows to the room in the pages"
    require(bool(fits.all()), expected, kv_len[~fits].tolist(), "visit_kv_len")
