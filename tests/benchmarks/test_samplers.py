"""Captures that fail and graphs that are checked again, with a CUDA whose graphs are lists of calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import pytest
import samplers
import timing
import torch
from measurement import Measurement, as_exact_as, verify
from samplers import CaptureFailed, EagerEvents, GraphReplay, capture
from timing import QUICK, Timer

CPU = torch.device("cpu")


class Cuda:
    """The stream that is current, and whether ending a capture fails."""

    def __init__(self) -> None:
        self.stream, self.invalid, self.captures = "main", False, 0

    @contextmanager
    def graph(self, graph: Graph):
        """As torch does it: where the end of the capture fails, its stream stays current."""
        self.captures += 1
        self.stream = "capture"
        try:
            yield
        finally:
            if self.invalid:
                self.invalid = False
                raise RuntimeError("capture was invalidated\nmore words")
            self.stream = "main"

    def waits(self) -> None:
        if self.stream == "capture":
            self.invalid = True
            raise RuntimeError("not permitted when stream is capturing\nmore words")


class Graph:
    """Replays what is assigned to `calls`."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    found = Cuda()
    replaced = {"graph": found.graph, "CUDAGraph": Graph, "Event": Event, "synchronize": lambda: None}
    replaced |= {"current_stream": lambda: found.stream}
    replaced |= {"set_stream": lambda stream: setattr(found, "stream", stream)}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(GraphReplay, "failed", False)
    return found


@pytest.fixture
def timer(cuda) -> Timer:
    found = Timer(CPU, QUICK)
    found.flush = lambda: None
    return found


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_failed_capture_names_its_cause_and_restores_the_stream(cuda):
    with pytest.raises(CaptureFailed, match=r"^not permitted when stream is capturing$"):
        capture(Graph(), cuda.waits)
    assert cuda.stream == "main"
    cuda.invalid = True
    with pytest.raises(CaptureFailed, match=r"^capture was invalidated$"):
        capture(Graph(), lambda: None)
    assert cuda.stream == "main"
    assert capture(Graph(), lambda: 3) == 3


def test_after_one_failed_capture_none_is_tried(cuda, timer):
    def waits_unseen(x):
        cuda.waits()
        return doubled(x)

    sets = [(torch.ones(3),), (torch.ones(3),)]
    found = timer.measure({"first": doubled, "second": waits_unseen, "third": doubled}, sets)
    assert {name: one.captured for name, one in found.items()} == {"first": True, "second": False, "third": False}
    assert found["second"].capture_error == "not permitted when stream is capturing"
    assert {name: one.tainted for name, one in found.items()} == {"first": False, "second": False, "third": True}
    assert {len(one.samples) for one in found.values()} == {QUICK.samples}
    another = Timer(CPU, QUICK)
    another.flush = lambda: None
    assert another.measure({"fourth": doubled}, sets)["fourth"].tainted
    assert cuda.captures == 2
    assert cuda.stream == "main"


def test_outputs_of_plain_calls_are_not_written_over(cuda):
    alive: list[int] = []

    def looks(x):
        out = 2 * x
        alive.append(out.data_ptr())
        return out

    sampler = EagerEvents(looks, [(torch.ones(1000),) for _ in range(6)], lambda: None)
    alive.clear()
    sampler()
    assert len(set(alive)) == 6


def replayed(*results: torch.Tensor, mutates: tuple[int, ...] = ()) -> tuple[Measurement, list, GraphReplay]:
    """A graph over two input sets, whose replays write these results."""
    plain = Measurement(
        kernel="double",
        shape={},
        dtype=torch.float32,
        make_inputs=lambda generator: (torch.randn(4, generator=generator),),
        backends={},
        check=as_exact_as(doubled),
        floor=None,
        mutates=mutates,
    )
    sets = [(torch.arange(4.0),), (torch.arange(4.0) + 7,)]
    run = (lambda x: None) if mutates else doubled
    sampler = GraphReplay(run, sets, lambda: None)
    targets = [inputs[0] for inputs in sets] if mutates else sampler.outputs
    sampler.graph.calls = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in zip(targets, results, strict=False)]
    return plain, sets, sampler


RIGHT = (2 * torch.arange(4.0), 2 * torch.arange(4.0) + 14)


@pytest.mark.parametrize(
    ("results", "wrong"), [(RIGHT, []), (RIGHT[:1], [1]), ((), [0, 1]), ((RIGHT[0], RIGHT[1] + 1), [1])]
)
def test_what_a_replay_leaves_is_checked(cuda, results, wrong):
    """The outputs held the right results when they were captured."""
    measurement, sets, sampler = replayed(*results)
    for number, run in enumerate(sampler.again(sets)):
        with pytest.raises(AssertionError, match="elements are wrong") if number in wrong else nullcontext():
            verify(measurement, run, sets[number], again=True)


def test_changed_inputs_are_restored_before_the_replay_that_is_checked(cuda):
    measurement, sets, sampler = replayed(mutates=(0,))
    originals = [measurement.original(inputs) for inputs in sets]
    sampler.graph.calls = [lambda x=x: x.mul_(2) for (x,) in sets]
    for _ in range(3):
        sampler()
    for inputs, run in zip(originals, sampler.again(originals), strict=True):
        verify(measurement, run, inputs, again=True)
    sampler.graph.calls = []
    for inputs, run in zip(originals, sampler.again(originals), strict=True):
        with pytest.raises(AssertionError, match="elements are wrong"):
            verify(measurement, run, inputs, again=True)


def test_an_input_that_a_replay_changes_is_seen(cuda):
    measurement, sets, sampler = replayed(*RIGHT)
    kept = [(inputs[0].clone(),) for inputs in sets]
    sampler.graph.calls.append(lambda: sets[1][0].zero_())
    first, second = sampler.again(sets)
    verify(measurement, first, kept[0], again=True)
    with pytest.raises(AssertionError, match="input 0 was changed"):
        verify(measurement, second, kept[1], again=True)


def test_sets_are_bounded_by_free_memory(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    monkeypatch.setattr(samplers.CacheFlush, "__init__", lambda self, device, cache: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    timer = Timer(torch.device("cuda"))
    assert timer.num_sets(100) == 80  # eight caches
    assert timer.num_sets(10) == timer.max_sets == 128
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 5000, 1 << 40))
    assert timer.num_sets(100) == 50
