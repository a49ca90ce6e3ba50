"""What the compiled attention keeps of a plan for those that follow it."""

from __future__ import annotations

import operator
from dataclasses import replace

import numpy as np
import pytest
import torch

from foveate.kernels.paged_attention import StepPlan
from foveate.kernels.paged_attention.tiles import KV_CHUNK, Tiles, tiles_of
from foveate.testing.segment_trees import Node, Tree, make_step

# A prompt of three chunks below a system message, and samples; the last three tokens of one are rows of the step.
LENGTHS = ((None, 70, 0), (0, 2 * KV_CHUNK + 1, 0), *((1, length, 1) for length in (1, 64, KV_CHUNK + 1)), (0, 9, 3))
TREE = Tree(tuple(Node(*node) for node in LENGTHS), page_size=16)


def tiles(plan: StepPlan) -> Tiles:
    return tiles_of(replace(plan), 5, 1 << 20, torch.device("cpu"))  # a copy: nothing is prepared


def assert_equal(found: Tiles, expected: Tiles) -> None:
    for name, value in vars(expected).items():
        same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert same(getattr(found, name), value), name


def shared_rows_reversed(plan: StepPlan) -> np.ndarray:
    rows = plan.visit_rows.copy()
    rows[: plan.visit_row_offsets[1]] = plan.rows_of(0)[::-1]
    return rows


CHANGES = {
    "keys": lambda plan: {"visit_kv_len": np.maximum(plan.visit_kv_len - 1, 3)},  # one chunk less
    "pages": lambda plan: {"visit_pages": plan.visit_pages[::-1].copy()},
    "rows": lambda plan: {"visit_rows": shared_rows_reversed(plan)},
    "causal": lambda plan: {"visit_causal": plan.visit_causal & False},
    "number of rows": lambda plan: {"slots": torch.arange(plan.num_rows + 1)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_lasts_serves_the_very_arrays_that_it_was_made_of(change):
    """`lasting`: a plan that shares it with another, and some of the arrays, gets the tiles that it gets alone."""
    plan = make_step(TREE).plan
    first, other = tiles(plan), replace(plan, **change(plan))
    assert other.lasting is plan.lasting
    assert plan.lasting
    alone = tiles(replace(other, lasting={}))
    assert_equal(tiles(other), alone)
    assert any(
        not torch.equal(getattr(alone, name), getattr(first, name))
        for name in ("pages", "rows", "tiles", "part_offsets")
    )
    assert_equal(tiles(plan), first)


def test_what_lengths_do_not_change_is_taken_over():
    plan = make_step(TREE).plan
    first = tiles(plan)
    longer = tiles(replace(plan, visit_kv_len=plan.visit_kv_len + (plan.visit_kv_len % 16 == 9)))  # 9 keys are 10 now
    assert longer.tiles[:, 2].sum() > first.tiles[:, 2].sum()
    for name in ("pages", "rows", "row_parts", "part_offsets"):
        assert getattr(longer, name) is getattr(first, name)
