"""The page pool against a plain Python model: no page is lost, used twice or freed twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from foveate.rollout.pages import OutOfPages, PagePool, pages_for

SIZES = [0, 1, 63, 64, 65, 1000]
NUM_PAGES = st.sampled_from([*SIZES, 2, 127, 128, 129, 200])


class Model:
    """What the pool promises, one Python set and no cleverness."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = set(range(num_pages))

    def expected(self, n: int) -> list[int]:
        for start in range(self.num_pages - n + 1):
            if all(page in self.free for page in range(start, start + n)):
                return list(range(start, start + n))
        return sorted(self.free)[:n]


def assert_agrees(pool: PagePool, model: Model) -> None:
    assert pool.num_pages == model.num_pages
    assert pool.num_free == len(model.free)
    assert pool.num_used == model.num_pages - len(model.free)
    assert [page for page in range(model.num_pages) if not pool.is_used(page)] == sorted(model.free)


class PoolTrace(RuleBasedStateMachine):
    @initialize(num_pages=NUM_PAGES)
    def create(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.model = Model(num_pages)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.model.free)), label="n")
        expected = self.model.expected(n)
        assert self.pool.allocate(n) == expected
        self.model.free -= set(expected)

    @rule(extra=st.integers(1, 2**31))
    def allocate_too_many(self, extra: int) -> None:
        wanted, num_free = len(self.model.free) + extra, len(self.model.free)
        if wanted >= 2**31:
            with pytest.raises(ValueError, match=f"got {wanted}"):
                self.pool.allocate(wanted)
        else:
            with pytest.raises(OutOfPages, match=rf"at least {wanted} free pages, got {num_free}$"):
                self.pool.allocate(wanted)

    @rule(seed=st.integers(0, 2**32), share=st.floats(0, 1))
    def free_some(self, seed: int, share: float) -> None:
        pages = self._used(seed, share)
        self.pool.free(pages)
        self.model.free |= set(pages)

    @rule(seed=st.integers(0, 2**32), share=st.floats(0, 1), data=st.data())
    def free_with_one_bad_page(self, seed: int, share: float, data: st.DataObject) -> None:
        pages = self._used(seed, share)
        bad = st.sampled_from([-1, -(2**31), self.model.num_pages, 2**31 - 1, 2**31, -(2**40)])
        if pages:
            bad |= st.sampled_from(pages)
        if self.model.free:
            bad |= st.sampled_from(sorted(self.model.free))
        page = data.draw(bad, label="bad page")
        pages.insert(data.draw(st.integers(0, len(pages)), label="where"), page)
        with pytest.raises(ValueError, match=rf"got {page} \("):
            self.pool.free(pages)

    def _used(self, seed: int, share: float) -> list[int]:
        used = sorted(set(range(self.model.num_pages)) - self.model.free)
        return random.Random(seed).sample(used, round(share * len(used)))

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pool"):
            assert_agrees(self.pool, self.model)


PoolTrace.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestPoolTrace = PoolTrace.TestCase


@pytest.mark.parametrize("num_pages", SIZES)
def test_one_by_one_every_page_once(num_pages):
    pool = PagePool(num_pages)
    assert [pool.allocate(1) for _ in range(num_pages)] == [[page] for page in range(num_pages)]
    assert (pool.num_free, pool.num_used) == (0, num_pages)
    with pytest.raises(OutOfPages, match="at least 1 free pages, got 0"):
        pool.allocate(1)
    for page in range(num_pages):
        pool.free([page])
    assert (pool.num_free, pool.num_used) == (num_pages, 0)


@pytest.mark.parametrize("num_pages", SIZES)
def test_whole_pool_at_once(num_pages):
    pool = PagePool(num_pages)
    assert pool.allocate(num_pages) == list(range(num_pages))
    assert pool.allocate(0) == []
    pool.free(range(num_pages))
    assert pool.num_free == num_pages


@given(num_pages=st.integers(1, 300), used=st.sets(st.integers(0, 299)), n=st.integers(1, 300))
@settings(max_examples=400)
def test_first_fit_in_any_pattern(num_pages, used, n):
    pool, model = PagePool(num_pages), Model(num_pages)
    model.free &= used
    pool.allocate(num_pages)
    pool.free(sorted(model.free))
    if n <= len(model.free):
        assert pool.allocate(n) == model.expected(n)
    else:
        with pytest.raises(OutOfPages):
            pool.allocate(n)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("start", [0, 1, 62, 63, 64, 65, 127])
def test_run_at_every_word_border(start, n):
    """A run of exactly n free pages, shorter ones before it."""
    pool = PagePool(400)
    pool.allocate(400)
    gap = [page for page in range(0, start - 1, 2) if n > 1]
    pool.free([*gap, *range(start, start + n)])
    assert pool.allocate(n) == list(range(start, start + n))
    assert pool.num_free == len(gap)


@pytest.mark.parametrize(
    ("num_pages", "free", "n"),
    [
        (200, range(0, 200, 2), 5),
        (200, range(1, 200, 2), 100),
        (70, [3, 69], 2),
        (64, [0, 63], 2),
        (65, [63, 64, 1], 3),
        (64, [0, 1, 5, 6], 3),
    ],
)
def test_lowest_pages_where_no_run_is_long_enough(num_pages, free, n):
    pool = PagePool(num_pages)
    pool.allocate(num_pages)
    pool.free(free)
    assert pool.allocate(n) == sorted(free)[:n]
    assert pool.num_free == len(free) - n


@pytest.mark.parametrize("num_pages", SIZES)
def test_the_page_past_the_end_does_not_exist(num_pages):
    pool = PagePool(num_pages)
    pool.allocate(num_pages)
    with pytest.raises(ValueError, match=rf"0 <= page < {num_pages}, got {num_pages} \("):
        pool.free([num_pages])
    with pytest.raises(ValueError, match=f"got {num_pages}"):
        pool.is_used(num_pages)


@pytest.mark.parametrize(
    ("pages", "named"),
    [([3, 3], "got 3 .*twice"), ([3, 200], "got 200"), ([3, -1], "got -1"), ([3, 9], "got 9 .*already free")],
)
def test_free_is_all_or_nothing(pages, named):
    pool = PagePool(100)
    pool.allocate(5)
    with pytest.raises(ValueError, match=named):
        pool.free(pages)
    assert pool.is_used(3)
    assert pool.num_used == 5


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31])
def test_bad_counts(value):
    with pytest.raises(ValueError, match=f"got {value}"):
        PagePool(value)
    with pytest.raises(ValueError, match=f"got {value}"):
        PagePool(4).allocate(value)
    with pytest.raises(ValueError, match=f"got {value}"):
        PagePool(4).is_used(value)


@pytest.mark.parametrize("pages", [[1.5], ["1"], [2**64], 1, None])
def test_what_is_no_page_list(pages):
    pool = PagePool(4)
    pool.allocate(4)
    with pytest.raises(TypeError):
        pool.free(pages)
    assert pool.num_used == 4


@given(tokens=st.integers(0, 10**9), page_size=st.integers(1, 4096))
def test_pages_for_is_the_least_that_holds_them(tokens, page_size):
    pages = pages_for(tokens, page_size)
    assert pages * page_size >= tokens
    assert pages == 0 or (pages - 1) * page_size < tokens


@pytest.mark.parametrize(("tokens", "page_size"), [(-1, 64), (1, 0), (1, -1)])
def test_pages_for_refuses(tokens, page_size):
    with pytest.raises(ValueError, match="expected"):
        pages_for(tokens, page_size)
