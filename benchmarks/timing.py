"""Times of calls on rotating inputs: a clock around several calls on the CPU, events around graph replays on CUDA."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Run = Callable[..., Any]
Inputs = tuple[Any, ...]

MIN_SETS = 2  # the next call never finds the inputs of the last one


@dataclass(frozen=True)
class Effort:
    """How much is spent on one kernel."""

    samples: int
    sample_seconds: float  # a sample on the CPU has as many calls as take this long
    total_seconds: float  # fewer samples are taken, at least `min_samples`, where all of them would take longer
    min_samples: int


FULL = Effort(samples=51, sample_seconds=2e-3, total_seconds=1.5, min_samples=7)
QUICK = Effort(samples=3, sample_seconds=0.0, total_seconds=0.0, min_samples=3)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, sample by sample."""

    samples: tuple[float, ...]
    captured: bool = False  # replays of a CUDA graph
    capture_error: str | None = None  # why it could not be captured although it was tried

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples, percent))

    @property
    def us(self) -> float:
        return self.percentile(50)

    def ratio_to(self, other: Timing) -> float:
        """How many times longer this one takes: the median over samples taken one after the other."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def bytes_of(inputs: Sequence[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in inputs if isinstance(x, torch.Tensor))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 << 20)


class WallClock:
    """Calls on the CPU, each on the next input set."""

    captured, capture_error = False, None

    def __init__(self, run: Run, input_sets: Sequence[Inputs], clock: Callable[[], float], effort: Effort) -> None:
        self.run, self.rotation, self.clock = run, itertools.cycle(input_sets), clock
        self.calls = 1
        for _ in range(2):  # the first sample is a warm-up
            seconds = self() * 1e-6
        self.calls = min(10_000, max(1, math.ceil(effort.sample_seconds / seconds))) if seconds else 1

    def __call__(self) -> float:
        """Microseconds of one call."""
        run, rotation = self.run, self.rotation
        start = self.clock()
        for _ in range(self.calls):
            run(*next(rotation))
        return (self.clock() - start) / self.calls * 1e6


class CacheFlush:
    """Leaves nothing of the inputs in the L2 cache of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(2 * cache_bytes(device) // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()
        # Read it again: lines that are still to be written back would be, at the expense of the kernel that is timed.
        self.buffer.amax()


class GraphReplay:
    """One call on each input set, captured in a CUDA graph and timed by events, from a cold cache."""

    captured, capture_error = True, None

    def __init__(self, run: Run, input_sets: Sequence[Inputs], flush: CacheFlush) -> None:
        self.flush, self.calls = flush, len(input_sets)
        for inputs in input_sets:  # warm-up: compilation and lazy set-up are no part of a capture
            run(*inputs)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            # Kept, so that no call writes where the last one did and finds it in the cache.
            self.outputs = [run(*inputs) for inputs in input_sets]
        self.graph.replay()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        """Microseconds of one call."""
        self.flush()
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / self.calls * 1e3


class EagerEvents:
    """What cannot be captured: plain calls between events, which include the time the GPU waits for the host."""

    captured = False

    def __init__(
        self, run: Run, input_sets: Sequence[Inputs], flush: CacheFlush, capture_error: str | None = None
    ) -> None:
        self.capture_error = capture_error
        self.run, self.input_sets, self.flush = run, input_sets, flush
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self()

    def __call__(self) -> float:
        """Microseconds of one call."""
        self.flush()
        self.start.record()
        for inputs in self.input_sets:
            self.run(*inputs)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / len(self.input_sets) * 1e3


class Timer:
    """Times several contenders in turn, sample by sample, so that drift of the machine meets all of them alike."""

    def __init__(
        self, device: torch.device, effort: Effort = FULL, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.effort, self.clock = device, effort, clock
        self.cache = cache_bytes(device)
        on_gpu = device.type == "cuda"
        # A graph holds one call a set, and the flush makes even few of them cold.
        self.max_sets, self.max_bytes = (16, 8 << 30) if on_gpu else (1024, 1 << 29)
        self.flush = CacheFlush(device) if on_gpu else None

    def num_sets(self, bytes_per_set: int) -> int:
        """Input sets to rotate among: twice the cache together, within the limits of memory."""
        wanted = math.ceil(2 * self.cache / max(1, bytes_per_set))
        allowed = min(self.max_sets, self.max_bytes // max(1, bytes_per_set))
        return max(MIN_SETS, min(wanted, allowed))

    def measure(
        self, runs: Mapping[str, Run], input_sets: Sequence[Inputs], *, eager: frozenset[str] = frozenset()
    ) -> dict[str, Timing]:
        """Name -> its timing. eager: names that are not to be captured in a graph, because they wait for the host."""
        samplers = {name: self._sampler(run, input_sets, name in eager) for name, run in runs.items()}
        start = self.clock()
        taken: dict[str, list[float]] = {name: [sampler()] for name, sampler in samplers.items()}
        round_seconds = self.clock() - start
        affordable = int(self.effort.total_seconds * len(runs) / round_seconds) if round_seconds > 0 else 0
        samples = max(self.effort.min_samples, min(self.effort.samples, affordable))
        for _ in range(samples - 1):
            for name, sampler in samplers.items():
                taken[name].append(sampler())
        return {
            name: Timing(tuple(us), samplers[name].captured, samplers[name].capture_error) for name, us in taken.items()
        }

    def _sampler(self, run: Run, input_sets: Sequence[Inputs], eager: bool) -> WallClock | GraphReplay | EagerEvents:
        if self.flush is None:
            return WallClock(run, input_sets, self.clock, self.effort)
        if eager:
            return EagerEvents(run, input_sets, self.flush)
        try:
            return GraphReplay(run, input_sets, self.flush)
        except RuntimeError as error:  # it waits for the host where torch does not see it
            return EagerEvents(run, input_sets, self.flush, str(error).splitlines()[0])
