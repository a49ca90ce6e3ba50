"""Deterministic attention: the same bits for a row whatever else a step computes, and however its keys came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate.kernels import paged_attention
from foveate.kernels.paged_attention import StepPlan
from foveate.kernels.paged_attention.deterministic import KV_CHUNK

PAGE, KV_HEADS, GROUP, HEAD_DIM = 16, 2, 3, 24
LENGTHS = (KV_CHUNK + 90, 3, KV_CHUNK + 40)  # of the segments on the one path: a root, one below it, its leaf
ENDS = np.cumsum(LENGTHS)
TOTAL = int(ENDS[-1])


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values of the path's tokens, float32 [TOTAL, heads, HEAD_DIM]."""
    return tuple(torch.randn(TOTAL, heads, HEAD_DIM) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))


def plan_of(rows: Sequence[tuple[int, int]]) -> StepPlan:
    """A step of consecutive tokens [start, stop) of the path, one run after another; segments begin on new pages."""
    first_page = np.cumsum([0, *(-(-length // PAGE) for length in LENGTHS)])
    visits, slots, row = [], [], 0
    for start, stop in rows:
        for depth, (end, length) in enumerate(zip(ENDS, LENGTHS, strict=True)):
            begin = end - length
            low, high = max(start, begin), min(stop, end)
            pages = range(first_page[depth], first_page[depth + 1])
            if low < high:
                visits.append((depth, pages, high - begin, range(row + low - start, row + high - start), True))
                at = np.arange(low, high) - begin
                slots.append(first_page[depth] * PAGE + at)
            if high < stop and end <= stop:
                visits.append((depth, pages, length, range(row + max(end - start, 0), row + stop - start), False))
        row += stop - start
    visits.sort(key=lambda visit: visit[0])
    return StepPlan(
        slots=torch.from_numpy(np.concatenate(slots)),
        visit_pages=np.concatenate([visit[1] for visit in visits]).astype(np.int32),
        visit_page_offsets=np.cumsum([0, *(len(visit[1]) for visit in visits)]).astype(np.int32),
        visit_kv_len=np.array([visit[2] for visit in visits], np.int32),
        visit_rows=np.concatenate([visit[3] for visit in visits]).astype(np.int32),
        visit_row_offsets=np.cumsum([0, *(len(visit[3]) for visit in visits)]).astype(np.int32),
        visit_depth=np.array([visit[0] for visit in visits], np.int32),
        visit_causal=np.array([visit[4] for visit in visits]),
        page_size=PAGE,
    )


def run(tokens, steps: Sequence[Sequence[tuple[int, int]]], deterministic: bool = True) -> torch.Tensor:
    """float32 [TOTAL, heads, HEAD_DIM]: each token's result in the last step that had it; the pool starts as NaN."""
    pages = sum(-(-length // PAGE) for length in LENGTHS)
    pools = [torch.full((pages, PAGE, KV_HEADS, HEAD_DIM), torch.nan) for _ in range(2)]
    out = torch.full_like(tokens[0], torch.nan)
    for rows in steps:
        index = torch.cat([torch.arange(*span) for span in rows])
        queries, keys, values = (x[index] for x in tokens)
        plan = plan_of(rows)
        paged_attention.store_kv(keys, values, *pools, plan)
        scale = HEAD_DIM**-0.5
        out[index] = paged_attention.prefill(queries, *pools, plan, scale=scale, deterministic=deterministic)
    return out


def pieces(size: int, start: int = 0) -> list[list[tuple[int, int]]]:
    return [[(begin, min(begin + size, TOTAL))] for begin in range(start, TOTAL, size)]


WHOLE = [[(0, TOTAL)]]
STEPS = {
    "chunks of 37": pieces(37),
    "chunks of 512": pieces(512),
    "a prompt, then one by one": [[(0, TOTAL - 60)], *pieces(1, TOTAL - 60)],
    "the last rows again, in a crowd": [*WHOLE, [(TOTAL - 3, TOTAL), (5, 30), (ENDS[0] - 1, ENDS[0] + 2)]],
}


def test_it_is_attention(tokens):
    queries, keys, values = (x.double().transpose(0, 1)[None] for x in tokens)
    exact = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(run(tokens, WHOLE).double(), exact, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_change_no_bit(steps, tokens):
    assert torch.equal(run(tokens, steps), run(tokens, WHOLE))


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps_change_bits_without_it(steps, tokens):
    assert not torch.equal(run(tokens, steps, deterministic=False), run(tokens, WHOLE, deterministic=False))


def test_a_row_of_nan_stays_alone(tokens):
    """A row that cannot be computed is NaN, not 0, and no other row of its block is touched."""
    expected = run(tokens, WHOLE)
    tokens[0][7, 0] = torch.nan
    found = run(tokens, WHOLE)
    assert found[7, 0].isnan().all()
    assert torch.equal(found[8:], expected[8:])
    assert torch.equal(found[:7], expected[:7])
