"""Times of calls on rotating inputs: a clock around several calls on the CPU, events around graph replays on CUDA."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samplers import CacheFlush, CaptureFailed, EagerEvents, GraphReplay, Inputs, Run, Sampler, WallClock

MIN_SETS = 2  # the next call never finds the inputs of the last one
# Bytes of inputs and outputs that are rotated among, in caches. What a GPU has written last stays in its L2 cache and
# is written back after the time is taken: of 8 caches it is a small share.
CACHES = {"cpu": 4, "cuda": 8}


@dataclass(frozen=True)
class Effort:
    """How much is spent on one kernel."""

    samples: int
    sample_seconds: float  # a sample on the CPU has as many calls as take this long
    total_seconds: float  # fewer samples are taken, at least `min_samples`, where all of them would take longer
    min_samples: int
    max_sets: int = 1024  # of inputs to rotate among


FULL = Effort(samples=51, sample_seconds=2e-3, total_seconds=1.5, min_samples=7)
QUICK = Effort(samples=3, sample_seconds=0.0, total_seconds=0.0, min_samples=3, max_sets=16)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, sample by sample."""

    samples: tuple[float, ...]
    captured: bool = False  # replays of a CUDA graph
    capture_error: str | None = None  # why it could not be captured although it was tried
    tainted: bool = False  # it was not tried: the capture of an earlier contender had failed

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


def _raise(name: str, error: Exception) -> None:
    raise error


class Timer:
    """Times several contenders in turn, sample by sample, so that drift of the machine meets all of them alike."""

    def __init__(
        self, device: torch.device, effort: Effort = FULL, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.effort, self.clock = device, effort, clock
        self.cache = cache_bytes(device)
        on_gpu = device.type == "cuda"
        # A graph holds one call a set; with so many, what is too small to fill the caches is bound by its launch.
        self.max_sets = min(effort.max_sets, 128) if on_gpu else effort.max_sets
        self.max_bytes = 8 << 30 if on_gpu else 1 << 29
        self.flush = CacheFlush(device, self.cache) if on_gpu else None

    def num_sets(self, bytes_per_set: int) -> int:
        """Input sets to rotate among: several caches together, within the limits of memory.

        bytes_per_set: of inputs and outputs.
        """
        max_bytes = self.max_bytes
        if self.device.type == "cuda":  # each contender has outputs of its own, and its check works in float64
            max_bytes = min(max_bytes, torch.cuda.mem_get_info(self.device)[0] // 8)
        wanted = math.ceil(CACHES[self.device.type] * self.cache / max(1, bytes_per_set))
        allowed = min(self.max_sets, max_bytes // max(1, bytes_per_set))
        return max(MIN_SETS, min(wanted, allowed))

    def measure(
        self,
        runs: Mapping[str, Run],
        input_sets: Sequence[Inputs],
        *,
        eager: frozenset[str] = frozenset(),
        check: Callable[[str, Sampler], None] | None = None,
        refuse: Callable[[str, Exception], None] = _raise,
    ) -> dict[str, Timing]:
        """Name -> its timing.

        eager: names that are not to be captured in a graph, because they wait for the host. check: called for each
        name after its last sample. refuse: told of a name that raised, be it in `check`; it has no timing.
        """
        samplers: dict[str, Sampler] = {}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        left = list(runs)

        def each(step: Callable[[str], None]) -> None:
            for name in tuple(left):
                try:
                    step(name)
                except Exception as error:
                    left.remove(name)
                    refuse(name, error)

        each(lambda name: samplers.update({name: self._sampler(runs[name], input_sets, name in eager)}))
        for _ in self._rounds(len(left)):
            each(lambda name: taken[name].append(samplers[name]()))
        if check is not None:
            each(lambda name: check(name, samplers[name]))
        return {name: self._timing(samplers[name], taken[name]) for name in left}

    def _rounds(self, contenders: int) -> Iterator[None]:
        """Once for each sample; the first round says how many are affordable."""
        start = self.clock()
        yield
        seconds = self.clock() - start
        affordable = int(self.effort.total_seconds * contenders / seconds) if seconds > 0 else 0
        yield from itertools.repeat(None, max(self.effort.min_samples, min(self.effort.samples, affordable)) - 1)

    def _timing(self, sampler: Sampler, taken: Sequence[float]) -> Timing:
        return Timing(tuple(taken), sampler.captured, sampler.capture_error, sampler.tainted)

    def _sampler(self, run: Run, input_sets: Sequence[Inputs], eager: bool) -> Sampler:
        if self.flush is None:
            return WallClock(run, input_sets, self.clock, self.effort.sample_seconds)
        if eager or GraphReplay.failed:
            return EagerEvents(run, input_sets, self.flush, tainted=GraphReplay.failed)
        try:
            return GraphReplay(run, input_sets, self.flush)
        except CaptureFailed as error:  # it waits for the host where torch does not see it
            GraphReplay.failed = True
            return EagerEvents(run, input_sets, self.flush, capture_error=str(error))
