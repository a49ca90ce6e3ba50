"""Callers from threads and from asyncio: the same groups, nobody starves, nothing is lost or left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import pytest
import torch

from foveate.rollout.config import SamplingParams
from foveate.rollout.testing import tiny_model
from foveate.rollout.types import Request, RequestError
from foveate.testing.callers import SECONDS, assert_idle, prompts, steppers, tokens


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


def test_everyone_gets_what_is_theirs_whoever_steps(engine, expected):
    """A loop of add_request and step beside generate, a stream and asyncio: no group goes to another."""
    results: dict[str, list] = {}
    begun = threading.Event()

    def by_hand() -> None:
        names = [engine.add_request(request) for request in prompts(6, max_tokens=30)]
        begun.set()
        groups = {}
        while engine.has_unfinished:
            groups |= {group.request_id: group for group in engine.step()}
        results["hand"] = tokens(groups[name] for name in names)
        assert set(groups) == set(names)

    def by_generate() -> None:
        begun.wait(SECONDS)
        results["generate"] = tokens(engine.generate(prompts(4, max_tokens=25)))

    threads = [threading.Thread(target=work) for work in (by_hand, by_generate)]
    for thread in threads:
        thread.start()
    results["asyncio"] = tokens(asyncio.run(engine.generate_async(prompts(5, max_tokens=20))))
    for thread in threads:
        thread.join(SECONDS)
    assert results == {
        "hand": expected(prompts(6, max_tokens=30)),
        "generate": expected(prompts(4, max_tokens=25)),
        "asyncio": expected(prompts(5, max_tokens=20)),
    }
    assert_idle(engine)


def test_a_loop_that_closes_takes_nobody_with_it(engine, expected, monkeypatch):
    """The thread that steps outlives a caller whose loop is closed when its group comes."""
    from foveate.rollout.asynchronous import _Call

    put = _Call.put

    class Closed:
        def call_soon_threadsafe(self, *_):
            raise RuntimeError("Event loop is closed")

    def lose_first(call, item):
        monkeypatch.setattr(_Call, "put", put)
        loop, call.loop = call.loop, Closed()
        put(call, item)
        call.loop = loop
        loop.call_soon_threadsafe(call.items.put_nowait, item)

    monkeypatch.setattr(_Call, "put", lose_first)
    assert tokens(asyncio.run(engine.generate_async(prompts(3)))) == expected(prompts(3))
    assert_idle(engine)


def test_a_thread_that_cannot_start_is_tried_again(engine, expected, monkeypatch):
    start, failures = threading.Thread.start, [RuntimeError("can't start new thread")]

    def fail_once(thread):
        if thread.name == "foveate-steps" and failures:
            raise failures.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with pytest.raises(RuntimeError, match="can't start"):
        asyncio.run(engine.generate_async(prompts(1)))
    call = asyncio.wait_for(engine.generate_async(prompts(2)), SECONDS)
    assert tokens(asyncio.run(_awaited(call))) == expected(prompts(2))
    assert_idle(engine)


async def _awaited(call):
    return await call


def test_a_step_that_breaks_off_ends_only_the_calls_it_ran(make_engine, expected):
    """With room for one sample the second call waits, and gets its groups."""
    engine = make_engine("qwen3", max_sequences=1)
    one, other = prompts(1, max_tokens=20), prompts(1, max_tokens=8)
    decode, calls = engine._runner.decode, []

    def break_once(sequences):
        calls.append(len(sequences))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return decode(sequences)

    engine._runner.decode = break_once

    async def main():
        first = asyncio.create_task(engine.generate_async(one))
        while not engine.stats()["running"]:
            await asyncio.sleep(0.001)
        return await asyncio.gather(first, engine.generate_async(other), return_exceptions=True)

    first, second = asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert isinstance(first, RuntimeError)
    assert tokens(second) == expected(other)
    assert_idle(engine)


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
