"""Callers from threads and from asyncio: the same groups, nobody starves, nothing is lost or left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.turns import Turns
from foveate.rollout.types import Request, RequestError

SECONDS = 60  # far beyond what anything here takes


def prompts(count: int, **sampling) -> list[Request]:
    """Token-id prompts of several lengths; a seed of its own each, so that the order of adding decides nothing."""
    sampling = {"max_tokens": 6, "ignore_eos": True, **sampling}
    return [
        Request([1 + i] * (3 + i % 5), n=1 + i % 3, sampling=SamplingParams(seed=i, **sampling)) for i in range(count)
    ]


def tokens(groups) -> list[list[list[int]]]:
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def steppers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "foveate-steps"]


def assert_idle(engine) -> None:
    """Nothing is left of any request, and the thread that stepped has ended."""
    for thread in steppers():
        thread.join(SECONDS)
    report, stats = engine.memory_report(), engine.stats()
    assert (report["kv_pages_used"], stats["running"], stats["waiting"]) == (0, 0, 0)
    assert not engine.has_unfinished
    assert not steppers()


@pytest.fixture
def engine(make_engine):
    return make_engine("qwen3")


@pytest.fixture
def expected(make_engine):
    """What `generate` returns for these requests on an engine of its own."""
    return lambda requests: tokens(make_engine("qwen3").generate(requests))


def test_calls_that_wait_together_get_their_own_groups(engine, expected):
    batches = [prompts(4), prompts(7)[3:], prompts(1), []]

    async def main():
        return await asyncio.gather(*(engine.generate_async(batch) for batch in batches))

    results = asyncio.run(main())
    assert [tokens(groups) for groups in results] == [expected(batch) for batch in batches]
    assert all(group.request is r for groups, batch in zip(results, batches, strict=True)
               for group, r in zip(groups, batch, strict=True))  # fmt: skip
    assert_idle(engine)


def test_calls_are_served_together(engine):
    """Two calls of 40 tokens take about 40 steps, not 80."""

    async def main():
        calls = (engine.generate_async(prompts(2, max_tokens=40)) for _ in range(2))
        return await asyncio.gather(*calls)

    asyncio.run(main())
    assert engine.stats()["steps"] < 60
    assert_idle(engine)


def test_the_event_loop_stays_free(engine):
    """While the engine stands in a step, the loop runs other coroutines."""
    inside, leave = threading.Event(), threading.Event()
    decode = engine._runner.decode

    def hold(sequences):
        inside.set()
        assert leave.wait(SECONDS)
        return decode(sequences)

    engine._runner.decode = hold

    async def main():
        call = asyncio.create_task(engine.generate_async(prompts(1)))
        while not inside.is_set():  # only a free loop comes here again and again
            await asyncio.sleep(0.001)
        assert not call.done()
        leave.set()
        return await call

    assert len(asyncio.run(asyncio.wait_for(main(), SECONDS))) == 1


def test_seeds_of_requests_without_one_follow_their_order(engine, make_engine):
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, seed=None)) for r in prompts(6)]
    assert tokens(asyncio.run(engine.generate_async(requests))) == tokens(make_engine("qwen3").generate(requests))


def test_a_bad_request_fails_alone(engine, expected):
    requests = prompts(3)
    requests.insert(1, Request([10**9]))
    groups = asyncio.run(engine.generate_async(requests))
    assert [group.error is None for group in groups] == [True, False, True, True]
    assert tokens(groups[:1] + groups[2:]) == expected(prompts(3))
    with pytest.raises(RequestError, match="1 of 4 requests failed") as caught:
        asyncio.run(engine.generate_async(requests, strict=True))
    assert len(caught.value.groups) == 4
    assert_idle(engine)


def test_a_cancelled_call_takes_only_its_own_requests(engine, expected):
    async def main():
        lost = asyncio.create_task(engine.generate_async(prompts(3, max_tokens=2000)))
        kept = asyncio.create_task(engine.generate_async(prompts(2, max_tokens=50)))
        while engine.stats()["running"] < 9:
            await asyncio.sleep(0.001)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        return await kept

    assert tokens(asyncio.run(asyncio.wait_for(main(), SECONDS))) == expected(prompts(2, max_tokens=50))
    assert_idle(engine)


def test_a_call_cancelled_while_it_enters(engine):
    """Whatever moment the cancellation hits, nothing stays."""

    async def main(delay: float):
        call = asyncio.create_task(engine.generate_async(prompts(5, max_tokens=500)))
        await asyncio.sleep(delay)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    for delay in (0, 0.001, 0.002, 0.005, 0.01, 0.02):
        asyncio.run(asyncio.wait_for(main(delay), SECONDS))
        assert_idle(engine)


def test_a_stream_gives_groups_as_they_finish_and_may_be_left(engine):
    requests = [Request([5, 6], sampling=SamplingParams(max_tokens=count, ignore_eos=True)) for count in (500, 2, 9)]

    async def main():
        lengths = []
        stream = engine.stream_async(requests)
        async for group in stream:
            lengths.append(len(group.rollouts[0].token_ids))
            if len(lengths) == 2:
                break
        await stream.aclose()
        return lengths

    assert asyncio.run(asyncio.wait_for(main(), SECONDS)) == [2, 9]
    assert_idle(engine)


def test_an_exception_of_a_step_reaches_those_it_ended(engine, expected):
    decode, calls = engine._runner.decode, []

    def break_once(sequences):
        calls.append(len(sequences))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return decode(sequences)

    engine._runner.decode = break_once

    async def main():
        return await asyncio.gather(*(engine.generate_async(prompts(2)) for _ in range(2)), return_exceptions=True)

    results = asyncio.run(asyncio.wait_for(main(), SECONDS))
    broken = [result for result in results if isinstance(result, RuntimeError)]
    assert broken
    assert all(str(error) == "out of memory" for error in broken)
    assert all(tokens(r) == expected(prompts(2)) for r in results if r not in broken)
    assert_idle(engine)
    assert tokens(asyncio.run(engine.generate_async(prompts(2)))) == expected(prompts(2))


def test_generate_in_threads_beside_asyncio(engine, expected):
    """Each caller gets exactly its own groups, whoever does the stepping."""
    batches = [prompts(5, max_tokens=20)[i:] for i in range(4)]
    results: dict[int, list] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            results[index] = tokens(engine.generate(batches[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()

    async def main():
        return await asyncio.gather(*(engine.generate_async(batch) for batch in batches[2:]))

    results |= dict(enumerate(map(tokens, asyncio.run(asyncio.wait_for(main(), SECONDS))), start=2))
    for thread in threads:
        thread.join(SECONDS)
    assert [results[index] for index in range(4)] == [expected(batch) for batch in batches]
    assert_idle(engine)


def test_groups_that_another_step_takes_are_missed_with_a_reason(engine):
    async def main():
        call = asyncio.create_task(engine.generate_async(prompts(1, max_tokens=300)))
        while not engine.stats()["running"]:
            await asyncio.sleep(0.001)
        with engine._turns:  # a loop of the caller's own, before the engine's thread
            while not engine.step():
                pass
        await call

    with pytest.raises(RuntimeError, match=r"others went to a call of step\(\)"):
        asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert_idle(engine)


def test_requests_may_be_added_by_many_threads(make_engine, expected):
    engine = make_engine("qwen3")
    ids: dict[int, list[str]] = {}

    def work(index: int) -> None:
        ids[index] = [engine.add_request(request) for request in prompts(8)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    groups = {}
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished:
        groups |= {group.request_id: group for group in engine.step()}
    assert len(groups) == 32
    for names in ids.values():
        assert tokens(groups[name] for name in names) == expected(prompts(8))
    assert_idle(engine)


def test_one_name_in_two_threads_is_given_once(make_engine):
    engine = make_engine("qwen3")
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait(SECONDS)
        try:
            outcomes.append(engine.add_request(Request([1, 2], request_id="same")))
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert outcomes.count("same") == 1
    assert all("an id that is not in use" in outcome for outcome in outcomes if outcome != "same")
    engine.abort("same")
    assert [group.request_id for group in engine.step()] == ["same"]


def test_an_engine_with_a_past_is_freed(make_engine):
    """The thread and the loop keep no engine alive."""
    import gc
    import weakref

    engine = make_engine(tiny_model("qwen3"))
    asyncio.run(engine.generate_async(prompts(1)))
    for thread in steppers():
        thread.join(SECONDS)
    known = weakref.ref(engine)
    del engine
    gc.collect()
    assert known() is None


class TestTurns:
    def test_first_come_first_served(self):
        turns, order = Turns(), []

        def work(index: int) -> None:
            with turns:
                order.append(index)

        threads = []
        with turns, turns:  # reentrant
            for index in range(5):
                threads.append(threading.Thread(target=work, args=(index,)))
                threads[-1].start()
                while len(turns._waiting) < index + 1:
                    time.sleep(0.001)
            assert order == []
        for thread in threads:
            thread.join(SECONDS)
        assert order == [0, 1, 2, 3, 4]

    def test_a_loop_that_takes_it_again_and_again_keeps_nobody_out(self):
        turns, stop, count = Turns(), threading.Event(), [0]

        def spin() -> None:
            while not stop.is_set():
                with turns:
                    count[0] += 1
                    time.sleep(0.001)

        thread = threading.Thread(target=spin)
        thread.start()
        while not count[0]:
            time.sleep(0.001)
        for _ in range(20):
            before = count[0]
            with turns:
                assert count[0] <= before + 2  # the round under way, and at most the one begun before we asked
        stop.set()
        thread.join(SECONDS)

    def test_an_exception_gives_it_back(self):
        turns = Turns()
        with pytest.raises(KeyError), turns:
            raise KeyError
        taken = threading.Thread(target=lambda: turns.__enter__() or turns.__exit__())
        taken.start()
        taken.join(SECONDS)
        assert not taken.is_alive()
