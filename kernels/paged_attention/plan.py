"""The flat arrays that tell an attention kernel what one step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class StepPlan:
    """One step over T query rows and V visits; a visit is one KV segment with the rows that attend to it.

    A plan is for the layers that one page holds. Where pages hold a part of the layers there is a plan for each part;
    those of layers that hold the same tokens differ in `slots` and `visit_pages` alone.

    Row r is the r-th new token of the step. Each row visits the segments on its path once, from the root
    (depth 0) to its own segment; its partial results are merged by log-sum-exp in depth order.

    slots: int64 [T], where row r's key and value go: page * page_size + offset.
    visit_pages: int32, the pages of all visited segments, concatenated; visit_page_offsets: int32 [V + 1].
    visit_kv_len: int32 [V], tokens of the segment that are valid once this step's keys are stored.
    visit_rows: int32, the query rows of all visits, concatenated; visit_row_offsets: int32 [V + 1].
    visit_depth: int32 [V], the segment's place on the path of its rows; visits are sorted by it.
    visit_causal: bool [V]; where set, the visit's m rows are the segment's last m tokens, in order, and row i
    of them sees the first kv_len - m + i + 1 tokens. Elsewhere every row sees all kv_len tokens.
    page_size: tokens a page. like: another plan of this step that differs in pages alone and runs before this one.
    prepared: what backends derive from the arrays once a step, each under names of its own; a copy begins without.
    lasting: the same for plans of several steps that have arrays in common: what is derived from those very arrays and
    from nothing else. None of them is changed once a plan has it.
    """

    slots: torch.Tensor
    visit_pages: np.ndarray
    visit_page_offsets: np.ndarray
    visit_kv_len: np.ndarray
    visit_rows: np.ndarray
    visit_row_offsets: np.ndarray
    visit_depth: np.ndarray
    visit_causal: np.ndarray
    page_size: int
    like: StepPlan | None = field(default=None, repr=False)
    lasting: dict[Any, Any] = field(default_factory=dict, repr=False)
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.slots.numel()

    @property
    def num_visits(self) -> int:
        return len(self.visit_kv_len)

    def pages_of(self, visit: int) -> np.ndarray:
        """int32, the pages of one visit, first token first."""
        return self.visit_pages[self.visit_page_offsets[visit] : self.visit_page_offsets[visit + 1]]

    def rows_of(self, visit: int) -> np.ndarray:
        """int32, the query rows of one visit."""
        return self.visit_rows[self.visit_row_offsets[visit] : self.visit_row_offsets[visit + 1]]
