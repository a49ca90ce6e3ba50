"""Moving what was kept: rows of a flat batch, planes of any type, keys and values between pages; and the budgets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from foveate.kernels import vision_prune
from foveate.kernels.dispatch import available
from foveate.kernels.vision_prune import Selection, keep_count, nested_budgets

BACKENDS = [name for name in available("vision_prune", torch.device("cpu")) if name != "triton"]


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_of_a_flat_batch():
    # Rows 0..19: text, a span of 5 at 2, an empty one at 8, text, a span of 7 at 9, text.
    starts, lengths = ints(2, 8, 9), ints(5, 0, 7)
    selection = Selection(ints(0, 3, 1, 2, 6), ints(0, 2, 2, 5))
    assert vision_prune.selected_rows(selection, starts).tolist() == [2, 5, 10, 11, 15]
    rows = vision_prune.surviving_rows(selection, starts, lengths, 20, 13)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [0, 1, 2, 5, 7, 8, 10, 11, 15, 16, 17, 18, 19]
    assert vision_prune.surviving_rows(selection, starts, lengths, 20, 15).tolist()[-3:] == [19, -1, -1]
    assert vision_prune.surviving_rows(selection, starts, lengths, 20, 3).tolist() == [0, 1, 2]
    nothing = Selection(ints(), ints(0))
    assert vision_prune.surviving_rows(nothing, ints(), ints(), 3, 3).tolist() == [0, 1, 2]
    assert vision_prune.surviving_rows(nothing, ints(), ints(), 0, 0).tolist() == []


def planes_of(tokens: int, width: int) -> tuple[list[torch.Tensor], list[int]]:
    """Hidden states, large positions, slots, masks, deepstack planes, views of many strides."""
    planes = [
        torch.randn(tokens, width).bfloat16(),
        torch.randint(2**30, 2**31 - 1, (3, tokens), dtype=torch.int32),
        torch.randint(2**40, 2**62, (tokens,)),
        torch.rand(tokens) < 0.5,
        torch.randn(3, tokens, width).half(),
        torch.randn(tokens, 2 * width + 1)[:, 1 : 1 + width],
        torch.randn(2, tokens, 3, 2, dtype=torch.float64),
        torch.randn(tokens, 0),
        torch.randn(tokens, 3)[:, 1],
        torch.randn(width, 3, tokens).transpose(0, 2),
        torch.randn(6, tokens)[::2],
    ]
    planes[0].view(-1)[::3] = torch.nan
    return planes, [0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 7, 8, 136])
@pytest.mark.parametrize("tokens", [1, 2, 129])
def test_compact_copies_bits(backend, width, tokens):
    planes, dims = planes_of(tokens, width)
    for rows in (torch.arange(tokens), torch.arange(0, tokens, 2), torch.randperm(tokens), torch.arange(0)):
        moved = vision_prune.compact(planes, rows.int(), dims=dims, backend=backend)
        for plane, dim, out in zip(planes, dims, moved, strict=True):
            wanted = plane.index_select(dim, rows)
            assert out.shape == wanted.shape
            assert out.dtype == wanted.dtype
            assert out.is_contiguous()
            assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8)) or not out.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compact_takes_any_number_of_planes(backend):
    planes = [torch.randn(9, 4) for _ in range(35)]
    moved = vision_prune.compact(planes, ints(8, 0), backend=backend)
    assert all(torch.equal(out, plane[[8, 0]]) for plane, out in zip(planes, moved, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 2, 8), (16, 4, 64)], ids=str)
def test_compact_kv_moves_tokens_between_pages(backend, dtype, shape):
    page_size, kv_heads, head_dim = shape
    pool = torch.randn(2, 5, 12, page_size, kv_heads, head_dim).to(dtype)
    before = pool.clone()
    pages, new_pages = ints(7, 2, 9), ints(0, 11)
    kept = torch.arange(0, 3 * page_size, 2)[: 2 * page_size]
    source = vision_prune.page_slots(pages, kept, page_size)
    target = vision_prune.page_slots(new_pages, torch.arange(len(kept)), page_size)
    layers = slice(2, 5)  # a group of layers of the pool
    vision_prune.compact_kv(pool[:, layers], pool[:, layers], source, target.int().long(), backend=backend)
    wanted = before.clone()
    for place, token in enumerate(kept.tolist()):
        page, offset = pages[token // page_size], token % page_size
        new_page, new_offset = new_pages[place // page_size], place % page_size
        wanted[:, layers, new_page, new_offset] = before[:, layers, page, offset]
    assert torch.equal(pool, wanted)
    other = torch.zeros(2, 3, 4, page_size, kv_heads, head_dim).to(dtype)
    vision_prune.compact_kv(before[:, layers], other, source[:1].int(), ints(3), backend=backend)
    assert torch.equal(other[:, :, 3 // page_size, 3 % page_size], before[:, layers, 7, 0])
    assert other.count_nonzero() <= other[:, :, 0, 0].numel()
    vision_prune.compact_kv(before, before, source[:0], source[:0], backend=backend)


def test_page_slots():
    assert vision_prune.page_slots(ints(5, 0, 3), torch.tensor([0, 3, 4, 7, 11]), 4).tolist() == [20, 23, 0, 3, 15]


def test_what_does_not_fit_is_named():
    plane, pool = torch.randn(4, 3), torch.randn(2, 3, 4, 2, 1, 8)
    slots = torch.arange(3)
    for message, call in (
        (r"a plane or more, got 0", lambda: vision_prune.compact([], ints(0))),
        (r"1 dimensions, got 2", lambda: vision_prune.compact([plane], ints(0), dims=[0, 1])),
        (r"a dimension of each plane, got \[2\]", lambda: vision_prune.compact([plane], ints(0), dims=[2])),
        (r"as many tokens in each plane, got \[4, 3\]", lambda: vision_prune.compact([plane, plane.t()], ints(0))),
        (r"int32 \[T'\], got 'int64", lambda: vision_prune.compact([plane], torch.tensor([0]))),
        (r"rows in \[0, 4\), got \(-1, 2\)", lambda: vision_prune.compact([plane], ints(2, -1))),
        (r"page_size, kv_heads, head_dim\], got", lambda: vision_prune.compact_kv(pool[0], pool, slots, slots)),
        (r"layers, heads and dtype of", lambda: vision_prune.compact_kv(pool, pool[:, 1:], slots, slots)),
        (r"contiguous pages", lambda: vision_prune.compact_kv(pool[..., :4], pool[..., :4], slots, slots)),
        (
            r"target_slots in \[0, 8\), got \(0, 8\) \(target",
            lambda: vision_prune.compact_kv(pool, pool, slots, slots * 4),
        ),
        (r"int64 \[3\], got 'int64 \[2\]", lambda: vision_prune.compact_kv(pool, pool, slots, slots[:2])),
        (r"twice, or also a source", lambda: vision_prune.compact_kv(pool, pool, slots, slots + 2)),
        (r"twice, or also a source", lambda: vision_prune.compact_kv(pool, pool.clone(), slots, slots * 0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_operators_are_registered(backend):
    plane, slots = torch.randn(4, 3), torch.tensor([1, 0])
    torch.library.opcheck(torch.ops.foveate.compact.default, ([plane, plane.t().contiguous()], slots.int(), [0, 1]))
    pool = torch.randn(2, 1, 3, 2, 1, 8)
    torch.library.opcheck(torch.ops.foveate.compact_kv.default, (pool, pool.clone(), slots, slots + 2))


def cheapest(shares: list[float], levels: int) -> float:
    """What the best of all schedules keeps, by trying all."""
    count = len(shares)
    splits = (c for k in range(min(levels, count)) for c in combinations(range(1, count), k))
    return min(sum(shares[a] * (b - a) for a, b in zip((0, *split), (*split, count), strict=True)) for split in splits)


@pytest.mark.parametrize("levels", [1, 2, 3, 8])
def test_nested_budgets_are_the_cheapest(levels):
    for count in (1, 2, 7, 10):
        shares = sorted(torch.rand(count).round(decimals=1).tolist(), reverse=True)
        layers, kept, extra = nested_budgets(shares, max_levels=levels)
        assert len(layers) == len(kept) <= levels
        assert layers[0] == 0
        assert list(layers) == sorted({*layers})
        ends = (*layers[1:], count)
        every = [share for share, a, b in zip(kept, layers, ends, strict=True) for _ in range(a, b)]
        assert all(given >= asked for given, asked in zip(every, shares, strict=True))
        assert sum(every) == pytest.approx(cheapest(shares, levels))
        assert extra == pytest.approx((sum(every) - sum(shares)) / count)


def test_schedules_of_few_levels_cost_nothing():
    fastv = nested_budgets([1.0] * 2 + [0.5] * 26)
    assert fastv == ((0, 2), (1.0, 0.5), 0.0)
    pyramid = [1.0] * 8 + [0.5] * 8 + [0.25] * 8 + [0.125] * 4
    assert nested_budgets(pyramid) == ((0, 8, 16, 24), (1.0, 0.5, 0.25, 0.125), 0.0)
    sigmoid = [1 / (1 + 2 ** (layer - 14)) for layer in range(28)]
    assert 0 < nested_budgets(sigmoid).extra < nested_budgets(sigmoid, max_levels=4).extra


def test_budgets_that_make_no_sense():
    for shares in ([], [0.5, 0.6], [1.2], [float("nan")]):
        with pytest.raises(ValueError, match=r"\(shares\)"):
            nested_budgets(shares)
    with pytest.raises(ValueError, match=r"\(max_levels\)"):
        nested_budgets([1.0], max_levels=0)


def test_keep_count():
    assert [keep_count(n, 0.5) for n in (0, 1, 2, 3, 1296)] == [0, 1, 1, 2, 648]
    assert keep_count(1000, 1e-9) == 1
    assert keep_count(1000, 0.0) == 0
    assert all(keep_count(n, 1.0) == n for n in range(50))
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1.5 \(share\)"):
        keep_count(3, 1.5)
