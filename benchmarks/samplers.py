"""What takes one sample of a contender: a clock around calls on the CPU, events around a CUDA graph or plain calls.

Each has `captured`, `capture_error` and `tainted` for its Timing, and `again`, by which its results are checked after
the last sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_leaves

from foveate.testing.uninitialised import fill_with_garbage

Run = Callable[..., Any]
Inputs = tuple[Any, ...]


class WallClock:
    """Calls on the CPU, each on the next input set."""

    captured, capture_error, tainted = False, None, False

    def __init__(
        self, run: Run, input_sets: Sequence[Inputs], clock: Callable[[], float], sample_seconds: float
    ) -> None:
        self.run, self.rotation, self.clock = run, itertools.cycle(input_sets), clock
        self.calls = 1
        for _ in range(2):  # the first sample is a warm-up
            seconds = self() * 1e-6
        self.calls = min(10_000, max(1, math.ceil(sample_seconds / seconds))) if seconds else 1

    def __call__(self) -> float:
        """Microseconds of one call."""
        run, rotation = self.run, self.rotation
        start = self.clock()
        for _ in range(self.calls):
            run(*next(rotation))
        return (self.clock() - start) / self.calls * 1e6

    def again(self, originals: Sequence[Inputs]) -> list[Run]:
        """For each input set what computes its results once more."""
        return [self.run] * len(originals)


class CacheFlush:
    """Leaves nothing of the inputs in the L2 cache of a GPU."""

    def __init__(self, device: torch.device, cache: int) -> None:
        self.buffer = torch.empty(2 * cache // 4, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()
        # Read it again: lines that are still to be written back would be, at the expense of the kernel that is timed.
        self.buffer.amax()


class CaptureFailed(Exception):
    """Its text is the first line of the first error."""


def capture(graph: torch.cuda.CUDAGraph, record: Callable[[], Any]) -> Any:
    """What `record` returns, recorded in `graph`. CaptureFailed if it cannot be; the current stream is as before."""
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            return record()
    except Exception as error:
        # Where the end of a capture fails, torch leaves the stream of the capture current.
        torch.cuda.set_stream(stream)
        cause: BaseException = error
        while cause.__context__ is not None:  # the end of an invalid capture fails, too, and hides what made it so
            cause = cause.__context__
        raise CaptureFailed((str(cause).splitlines() or [type(cause).__name__])[0]) from error


class GraphReplay:
    """One call on each input set, captured in a CUDA graph and timed by events, from a cold cache."""

    captured, capture_error, tainted = True, None, False
    # A failed capture leaves torch's generators and allocator in it, for the rest of the process: it is the last one.
    failed: ClassVar[bool] = False

    def __init__(self, run: Run, input_sets: Sequence[Inputs], flush: CacheFlush) -> None:
        self.flush, self.input_sets = flush, input_sets
        for inputs in input_sets:  # warm-up: compilation and lazy set-up are no part of a capture
            run(*inputs)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # Kept, so that no call writes where the last one did and finds it in the cache.
        self.outputs = capture(self.graph, lambda: [run(*inputs) for inputs in input_sets])
        self.graph.replay()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        """Microseconds of one call."""
        self.flush()
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / len(self.input_sets) * 1e3

    def again(self, originals: Sequence[Inputs]) -> list[Run]:
        """For each input set what hands over its inputs and results as one more replay, into poisoned memory, left
        them. originals: the input sets, with copies of what a call changes."""
        kept = {x.untyped_storage().data_ptr() for x in _tensors(self.input_sets)}
        for x in _tensors(self.outputs):
            if x.untyped_storage().data_ptr() not in kept:
                fill_with_garbage(x)
        for x, original in zip(_tensors(self.input_sets), _tensors(originals), strict=True):
            if x is not original:
                x.copy_(original)
        self.graph.replay()
        torch.cuda.synchronize()
        return [partial(_hand_over, *left) for left in zip(self.input_sets, self.outputs, strict=True)]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _hand_over(inputs: Inputs, outputs: Any, *copies: Any) -> Any:
    for copy, x in zip(_tensors(copies), _tensors(inputs), strict=True):
        copy.copy_(x)
    return outputs


class EagerEvents:
    """What cannot be captured: plain calls between events, which include the time the GPU waits for the host."""

    captured = False

    def __init__(
        self,
        run: Run,
        input_sets: Sequence[Inputs],
        flush: CacheFlush,
        capture_error: str | None = None,
        tainted: bool = False,
    ) -> None:
        self.capture_error, self.tainted = capture_error, tainted
        self.run, self.input_sets, self.flush = run, input_sets, flush
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self()

    def __call__(self) -> float:
        """Microseconds of one call."""
        self.flush()
        self.start.record()
        outputs = [self.run(*inputs) for inputs in self.input_sets]  # kept for the same reason as those of a graph
        self.end.record()
        self.end.synchronize()
        del outputs
        return self.start.elapsed_time(self.end) / len(self.input_sets) * 1e3

    def again(self, originals: Sequence[Inputs]) -> list[Run]:
        """For each input set what computes its results once more."""
        return [self.run] * len(originals)


Sampler = WallClock | GraphReplay | EagerEvents
