"""Where requests enter and groups leave: threads, interruptions in the midst of a step, and whose group is whose."""

from __future__ import annotations

import threading
import time

import pytest

from foveate.rollout.config import SamplingParams
from foveate.rollout.turns import Turns
from foveate.rollout.types import Request
from foveate.testing.callers import SECONDS, assert_idle, prompts, tokens


@pytest.fixture
def engine(make_engine):
    return make_engine("qwen3")


@pytest.fixture
def expected(make_engine):
    """What `generate` returns for these requests on an engine of its own."""
    return lambda requests: tokens(make_engine("qwen3").generate(requests))


def test_a_stream_that_waits_keeps_its_groups(engine):
    """Somebody's own step() neither takes nor waits for what a stream has yet to hand over."""
    stream = engine.stream(prompts(3, max_tokens=4))
    first = next(stream)
    name = engine.add_request(Request([9, 9], sampling=SamplingParams(max_tokens=30)))
    mine = []
    while engine.has_unfinished:
        mine += engine.step()
    assert [group.request_id for group in mine] == [name]
    assert len({first.request_id, *(group.request_id for group in stream)}) == 3
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


class TestInterruptions:
    """What comes in the midst of a step: the end of an abandoned stream, a signal handler, an interrupt."""

    @pytest.fixture
    def during(self, engine):
        """during(call): `call` runs once, within the next decode."""

        def install(call) -> None:
            decode = engine._runner.decode

            def run(sequences):
                engine._runner.decode = decode
                call()
                return decode(sequences)

            engine._runner.decode = run

        return install

    def test_an_abandoned_stream_ends_between_steps(self, engine, during, expected):
        """As when the garbage collector finds it while others run: they are not disturbed."""
        stream = engine.stream(prompts(3, max_tokens=500))
        engine.add_request(Request([4], request_id="kept", sampling=SamplingParams(max_tokens=3, ignore_eos=True)))
        engine._advance()
        during(stream.close)
        results = engine.generate(prompts(4))
        assert tokens(results) == expected(prompts(4))
        assert [group.request_id for group in engine.step()] == ["kept"]
        assert_idle(engine)

    def test_a_signal_handler_may_abort(self, engine, during, expected):
        name = engine.add_request(Request([4], sampling=SamplingParams(max_tokens=500)))
        engine.step()
        during(lambda: engine.abort(name))
        assert tokens(engine.generate(prompts(4))) == expected(prompts(4))
        (group,) = engine.step()
        assert (group.request_id, group.rollouts[0].finish_reason) == (name, "abort")
        assert_idle(engine)

    @pytest.mark.parametrize("name", ["step", "update_weights", "score"])
    def test_what_would_change_a_step_is_refused_within_it(self, engine, during, name):
        call = {
            "step": engine.step,
            "update_weights": lambda: engine.update_weights(in_flight="keep"),
            "score": lambda: engine.score([]),
        }[name]
        seen = []

        def attempt() -> None:
            with pytest.raises(RuntimeError, match=rf"between two steps.*\({name}\)"):
                call()
            seen.append(name)

        during(attempt)
        engine.generate(prompts(1), strict=True)
        assert seen == [name]
        assert engine.weight_version == 0

    def test_an_interrupt_while_results_are_made_loses_none(self, engine, monkeypatch):
        """Two groups end together and decoding the first one's text is interrupted: both come with the next step."""
        names = [engine.add_request(Request([4], sampling=SamplingParams(max_tokens=2))) for _ in range(2)]
        finish, interrupts = engine._desk._finish, [KeyboardInterrupt()]

        def interrupted(group):
            if interrupts:
                raise interrupts.pop()
            return finish(group)

        monkeypatch.setattr(engine._desk, "_finish", interrupted)
        groups = engine.step()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert engine.has_unfinished
        groups += engine.step()
        assert sorted(group.request_id for group in groups) == sorted(names)
        assert all(len(group.rollouts[0].token_ids) == 2 for group in groups)
        assert engine.stats()["finished"] == 2
        engine.update_weights()
        assert_idle(engine)

    def test_a_collection_while_a_turn_is_asked_for(self, engine):
        """An iterator's end that runs within the lock's own code must not wait for the lock."""
        stream = engine.stream(prompts(2, max_tokens=100))
        next_step = engine._desk._turns
        engine._advance()
        assert next_step._mutex.acquire()
        try:
            stream.close()
        finally:
            next_step._mutex.release()
        engine.generate(prompts(1))
        assert_idle(engine)


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
