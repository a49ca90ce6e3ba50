"""Clock, rotation and percentiles, by a clock that the timed code moves: nothing depends on the machine's speed."""

from __future__ import annotations

import pytest
import timing
import torch
from timing import Effort, Timer, Timing

CPU = torch.device("cpu")


class FakeClock:
    """Seconds that pass only when `advance` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_percentiles():
    taken = Timing(tuple(float(x) for x in (11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6)))
    assert (taken.percentile(20), taken.us, taken.percentile(80)) == (3, 6, 9)
    assert Timing((1.0, 2.0, 4.0, 8.0)).us == 3  # between the two in the middle
    assert Timing((1.0, 2.0)).percentile(80) == pytest.approx(1.8)


def test_ratio_is_of_pairs():
    """The machine slows down half-way: each pair still says 2."""
    assert Timing((2.0, 2.0, 20.0)).ratio_to(Timing((1.0, 1.0, 10.0))) == 2
    with pytest.raises(ValueError, match="shorter"):
        Timing((1.0, 2.0)).ratio_to(Timing((1.0,)))


def test_every_call_gets_another_input_set(clock):
    seen = []
    timer = Timer(CPU, Effort(samples=4, sample_seconds=5.0, total_seconds=1e9, min_samples=1), clock)

    def run(number):
        seen.append(number)
        clock.advance(1.0)

    timer.measure({"kernel": run}, [(0,), (1,), (2,)])
    assert len(seen) == 1 + 1 + 4 * 5  # two calls to warm up and to size a sample, then 4 samples of 5
    assert seen == [i % 3 for i in range(len(seen))]


def test_calls_of_a_sample_fill_its_time(clock):
    timer = Timer(CPU, Effort(samples=3, sample_seconds=1.0, total_seconds=1e9, min_samples=1), clock)
    calls = []

    def run():
        calls.append(None)
        clock.advance(0.25)

    taken = timer.measure({"kernel": run}, [(), ()])["kernel"]
    assert taken.samples == (0.25e6,) * 3
    assert len(calls) == 2 + 3 * 4


def test_first_call_is_not_counted(clock):
    costs = iter([100.0])
    timer = Timer(CPU, Effort(samples=3, sample_seconds=0.0, total_seconds=1e9, min_samples=1), clock)
    taken = timer.measure({"kernel": lambda: clock.advance(next(costs, 1.0))}, [(), ()])["kernel"]
    assert taken.samples == (1e6, 1e6, 1e6)


@pytest.mark.parametrize(("total_seconds", "samples"), [(1e9, 50), (10.0, 10), (0.0, 3)])
def test_slow_kernels_have_fewer_samples(clock, total_seconds, samples):
    effort = Effort(samples=50, sample_seconds=0.0, total_seconds=total_seconds, min_samples=3)
    timer = Timer(CPU, effort, clock)
    taken = timer.measure({"kernel": lambda: clock.advance(1.0)}, [(), ()])["kernel"]
    assert len(taken.samples) == samples


def test_contenders_take_turns(clock):
    order = []
    timer = Timer(CPU, Effort(samples=3, sample_seconds=0.0, total_seconds=1e9, min_samples=1), clock)

    def contender(name):
        def run():
            order.append(name)
            clock.advance(1.0)

        return run

    timer.measure({name: contender(name) for name in "ab"}, [(), ()])
    assert "".join(order) == "aabb" + "ab" * 3  # warm-up of each, then in turn


def test_a_contender_that_raises_keeps_no_other_from_being_timed(clock):
    def contender(calls):
        left = iter(range(calls))

        def run():
            next(left)  # StopIteration after so many
            clock.advance(1.0)

        return run

    timer = Timer(CPU, Effort(samples=5, sample_seconds=0.0, total_seconds=1e9, min_samples=1), clock)
    runs = {"at once": contender(0), "good": contender(100), "late": contender(4), "wrong": contender(100)}
    refused = {}

    def check(name, sampler):
        assert name != "wrong", "half"

    found = timer.measure(runs, [(), ()], check=check, refuse=refused.__setitem__)
    assert list(found) == ["good"]
    assert found["good"].samples == (1e6,) * 5
    kinds = {name: type(error) for name, error in refused.items()}
    assert kinds == {"at once": StopIteration, "late": StopIteration, "wrong": AssertionError}
    with pytest.raises(StopIteration):
        timer.measure({"at once": contender(0)}, [(), ()])


def test_input_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    timer = Timer(CPU)
    assert timer.num_sets(100) == 40
    assert timer.num_sets(300) == 14  # 14 * 300 is the first multiple not below 4000
    assert timer.num_sets(10**6) == timing.MIN_SETS == 2
    assert timer.num_sets(0) == timer.max_sets
    timer.max_bytes = 500
    assert timer.num_sets(100) == 5


def test_bytes_of_inputs():
    assert timing.bytes_of((torch.zeros(3, 2), "plan", torch.zeros(5, dtype=torch.bfloat16))) == 24 + 10


def test_cache_of_the_cpu_is_found():
    assert timing.cache_bytes(CPU) >= 1 << 18
