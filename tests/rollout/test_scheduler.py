"""Whole schedules of random groups: every page is there when it is needed, and all are back in the end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.rollout.config import EngineConfig
from foveate.rollout.scheduler import Batch, Group, Sequence
from foveate.testing.schedules import Driver, group_of, least_pages, scheduler_of

VERSIONS = (0, 0)


@settings(max_examples=150, deadline=None)
@given(
    page_size=st.sampled_from([1, 2, 3, 8]),
    num_pages=st.integers(1, 40),
    max_sequences=st.sampled_from([1, 2, 5, 100]),
    max_batch_tokens=st.sampled_from([1, 3, 6, 12, 100]),
    stop_chance=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    update_chance=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_any_schedule(page_size, num_pages, max_sequences, max_batch_tokens, stop_chance, update_chance, seed):
    """Groups come while others run; prompts share beginnings; samples stop early; some are aborted at any time.

    Weights change while they run.
    """
    scheduler = scheduler_of(num_pages, page_size, max_sequences=max_sequences, max_batch_tokens=max_batch_tokens)
    driver = Driver(scheduler, seed, stop_chance)
    draw = driver.random
    accepted = []
    for index in range(16):
        lengths = [draw.choice((1, 2, 3, 5)) for _ in range(draw.choice((1, 2, 2, 3)))]
        max_tokens = draw.choice((1, 2, 3, 9, 20))
        group = group_of(str(index), lengths, draw.choice((1, 2, 4)), max_tokens, draw.choice((0, 0, 1)))
        if len(group.sequences) > max_sequences or least_pages(group, page_size) > num_pages:
            with pytest.raises(ValueError, match="expected"):
                driver.add(group)
            continue
        driver.add(group)
        accepted.append(group)
        for _ in range(draw.choice((0, 0, 1, 3, 9))):
            if driver.unfinished:
                driver.step()
        if driver.unfinished and draw.random() < 0.3:
            driver.abort(draw.choice(driver.unfinished))
        if draw.random() < update_chance:
            driver.keep()
    driver.finish()
    assert sorted(map(id, driver.ended)) == sorted(map(id, accepted))
    drawn = [s for group in driver.ended for s in group.sequences if s.finish_reason != "abort"]
    assert all(1 <= len(s.token_ids) <= s.group.max_tokens for s in drawn)


def spans_of(batch: Batch) -> list[tuple[int, int]]:
    return [(start, stop) for _, start, stop in batch.chunks]


def groups_of(sequences: list[Sequence]) -> list[Group]:
    return list(dict.fromkeys(sequence.group for sequence in sequences))


def test_prompts_fill_the_token_budget_while_others_decode():
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    groups = [group_of(str(token), [4], 2, 4, token) for token in range(5)]
    driver.add(*groups)
    first, second = driver.step(), driver.step()
    assert (spans_of(first), groups_of(first.firsts), first.decodes) == ([(0, 4), (0, 4), (0, 2)], groups[:2], [])
    assert (spans_of(second), groups_of(second.firsts)) == ([(2, 4), (0, 4), (0, 4)], groups[2:])
    assert second.decodes == [sequence for group in groups[:2] for sequence in group.sequences]
    third = driver.step()
    assert (third.chunks, third.firsts) == ([], [])
    assert third.decodes == [sequence for group in groups for sequence in group.sequences]


def test_prompts_that_are_found_cost_no_budget():
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    groups = [group_of(str(index), [8], 1, 2) for index in range(3)]
    driver.add(*groups)
    batch = driver.step()
    assert spans_of(batch) == [(0, 8)]
    assert groups_of(batch.firsts) == groups


def test_a_prompt_longer_than_the_budget_goes_in_chunks():
    """What runs decodes in between, and what comes later gets the rest of the budget of the last step."""
    driver = Driver(scheduler_of(100, max_batch_tokens=10))
    running, long, short = group_of("", [1], 1, 9), group_of("", [5, 20], 1, 2, 1), group_of("", [1], 1, 2, 2)
    driver.add(running)
    driver.step()
    driver.add(long, short)
    batches = [driver.step() for _ in range(3)]
    assert [spans_of(batch) for batch in batches] == [[(0, 5), (0, 5)], [(5, 15)], [(15, 20), (0, 1)]]
    assert [groups_of(batch.firsts) for batch in batches] == [[], [], [long, short]]
    assert all(batch.decodes == running.sequences for batch in batches)


def test_a_shared_prefix_outlives_the_group_that_began_it():
    """The first of two groups is aborted half-way through the prefix; the other one goes on from there."""
    driver = Driver(scheduler_of(100, max_batch_tokens=4))
    groups = [group_of(str(length), [10, length], 1, 2) for length in (3, 1)]
    driver.add(*groups)
    driver.step()
    batch = driver.step()
    assert spans_of(batch) == [(4, 8)]
    driver.scheduler.config = EngineConfig(page_size=2, max_batch_tokens=11)
    assert spans_of(driver.step()) == [(8, 10), (0, 3), (0, 1)]
    driver.finish()


def test_nobody_overtakes():
    """A small group behind one that does not fit yet waits with it."""
    driver = Driver(scheduler_of(4))
    first, large, small = (group_of(name, [2], n, 4, token=n) for name, n in (("first", 1), ("large", 2), ("small", 1)))
    driver.add(first, large, small)
    assert groups_of(driver.step().firsts) == [first], "it holds 2 of 4 pages, the next one needs 3"
    assert list(driver.scheduler.waiting) == [large, small]
    assert driver.step().decodes == first.sequences


def test_a_shared_prefix_is_paid_once():
    """Two groups of 4 prompt and 2 first pages run in 8 pages, because 4 are the same."""
    driver = Driver(scheduler_of(8))
    groups = [group_of(str(index), [8], 2, 3) for index in range(2)]
    driver.add(*groups)
    assert groups_of(driver.step().firsts) == groups
    assert driver.scheduler.tree.pool.num_used == 8


def test_other_weights_share_nothing():
    scheduler = scheduler_of(20)
    groups = [group_of(str(index), [8], 1, 3) for index in range(2)]
    for versions, group in enumerate(groups):
        scheduler.add(group)
        scheduler.next((versions, 0))
    assert scheduler.tree.num_shared == 0
    assert scheduler.tree.pool.num_used == 10


@pytest.mark.parametrize(("n", "max_tokens", "needed"), [(2, 6, 6), (4, 6, 7), (2, 1, 3), (1, 16, 11)])
def test_a_request_that_cannot_fit_is_refused(n, max_tokens, needed):
    """Segments of 3 and 1 tokens take 2 + 1 pages of 2; then a page a sample, or all of one sample."""
    driver = Driver(scheduler_of(needed))
    driver.add(group_of("", [3, 1], n, max_tokens))
    driver.finish()
    scheduler = scheduler_of(needed - 1)
    with pytest.raises(ValueError, match=rf"{needed - 1} pages of 2 tokens .* got one of {needed} pages \(kv_memory\)"):
        scheduler.add(group_of("", [3, 1], n, max_tokens))
    assert not scheduler.has_unfinished


def test_more_samples_than_the_engine_runs_are_refused():
    with pytest.raises(ValueError, match=r"expected n <= max_sequences = 3, got 4 \(n\)"):
        scheduler_of(100, max_sequences=3).add(group_of("", [1], 4, 1))


def test_one_token_needs_no_page_of_its_own():
    """The token that is drawn last is never fed."""
    driver = Driver(scheduler_of(1))
    driver.add(group_of("", [2], 3, 1))
    driver.step()
    assert [len(s.token_ids) for s in driver.ended[0].sequences] == [1, 1, 1]
    driver.finish()


def test_the_youngest_gives_up_its_pages():
    """Pages of 2: two groups of a prompt page and two samples each. The fourth token of the first makes room."""
    driver = Driver(scheduler_of(7))
    old, young = (group_of(str(token), [2], 2, 9, token) for token in range(2))
    driver.add(old, young)
    for _ in range(3):
        driver.step()
    assert driver.scheduler.tree.pool.num_used == 6
    assert driver.scheduler.running == [*old.sequences, *young.sequences]
    batch = driver.step()
    assert batch.decodes == old.sequences, "one free page, and two of the young samples and their prompt"
    assert (driver.scheduler.num_preempted, list(driver.scheduler.waiting)) == (2, [young])
    assert young.path == []
    assert [len(s.token_ids) for s in young.sequences] == [3, 3]
    kept = [list(s.token_ids) for s in young.sequences]
    while not old.is_finished:
        driver.step()
    batch = driver.step()
    assert spans_of(batch) == [(0, 2), (0, 2), (0, 2)], "the prompt, and what each sample had stored"
    assert batch.firsts == []
    assert [s.token_ids for s in young.sequences] == kept
    assert driver.step().decodes == young.sequences
    driver.finish()


def test_samples_of_one_group_take_turns():
    """Four samples of which one alone fits at its full length: each ends, the first ones first."""
    driver = Driver(scheduler_of(7))
    group = group_of("", [2], 4, 12)
    driver.add(group)
    ended: list[Sequence] = []
    while driver.unfinished:
        driver.step()
        ended += [s for s in group.sequences if s.finish_reason and s not in ended]
    assert ended == group.sequences
    assert driver.scheduler.num_preempted >= 3


@pytest.mark.parametrize(("num_pages", "most"), [(8, 8), (9, 8), (11, 8), (13, 6)])
def test_a_sample_comes_back_with_a_page_to_spare_for_each_that_runs(num_pages, most):
    """Else the pages it comes back to are taken again in the steps that follow: 10, 10, 10 and 8 times in all."""
    driver = Driver(scheduler_of(num_pages))
    driver.add(*(group_of(name, [2], 2, 14) for name in "abc"))
    while driver.unfinished:
        driver.step()
    assert 0 < driver.scheduler.num_preempted <= most


@pytest.mark.parametrize("num_pages", [12, 60, 200])
def test_hundreds_of_groups_in_flight(num_pages):
    driver = Driver(scheduler_of(num_pages, 4, max_sequences=256, max_batch_tokens=64), seed=3, stop_chance=0.05)
    for index in range(300):
        driver.add(group_of(str(index), [4, 1 + index % 9], 1 + index % 4, 1 + index % 30, token=index % 7))
    driver.finish(20_000)
    assert len(driver.ended) == 300
    assert driver.scheduler.num_preempted > 0


def test_samples_that_an_update_throws_out_come_back_on_a_new_prompt():
    """Pages of 2: a prompt of one page, samples of up to 5. Two of four keep theirs; the others wait for both."""
    driver = Driver(scheduler_of(12))
    group, later = group_of("", [2], 4, 11), group_of("", [2], 1, 3)
    driver.add(group, later)
    driver.step()
    assert driver.scheduler.running == [*group.sequences, *later.sequences]
    driver.keep()
    assert driver.scheduler.running == group.sequences[:2]
    assert (list(driver.scheduler.waiting), driver.scheduler.num_preempted) == ([group, later], 3)
    old = group.path[0]
    while group.sequences[0].leaf is not None:
        assert driver.step().chunks == []
    batch = driver.step()
    assert group.path[0] is not old
    assert spans_of(batch) == [(0, 2)], "the prompt, and of each sample the one token that it feeds next"
    assert driver.scheduler.running == [*group.sequences[2:], *later.sequences]
    driver.finish()


def test_a_prompt_that_nobody_runs_on_is_not_kept():
    """Of samples that take turns the first ones have just ended: what waits starts on a prompt of the new weights."""
    driver = Driver(scheduler_of(7))
    group = group_of("", [2], 4, 12)
    driver.add(group)
    while not group.sequences[0].finish_reason or driver.scheduler.running:
        driver.step()
    old = group.path[0]
    driver.keep()
    assert (group.path, group.kept_versions, old.pages) == ([], [], [])
    assert spans_of(driver.step())[0] == (0, 2)
    driver.finish()


def test_features_at_an_update():
    driver = Driver(scheduler_of(12, max_batch_tokens=2))
    group = group_of("", [2, 2], 1, 3)
    driver.add(group)
    driver.step()
    for changes_vision, left in ((False, 1), (True, 0)):
        group.path[1].features = {b"image": torch.zeros(2, 1, 8)}
        driver.scheduler.keep(0, changes_vision)
        assert len(group.path[1].features) == left


def test_an_empty_scheduler():
    scheduler = scheduler_of(1)
    scheduler.keep(0, changes_vision=True)
    batch = scheduler.next(VERSIONS)
    assert (batch.chunks, batch.decodes, batch.firsts) == ([], [], [])
    assert (scheduler.retire(), scheduler.has_unfinished) == ([], False)
