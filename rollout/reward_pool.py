"""Scores finished groups on threads of their own while others decode."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import RolloutGroup


class RewardPool:
    """Calls `score` with each submitted group; used once, as a context.

    workers: groups that are scored at a time; the others queue in the order they came. 0 scores when the results are
    asked for, one after another in the caller's thread. Leaving the context by an exception drops what is queued.
    """

    def __init__(self, score: Callable[[RolloutGroup], RewardTable], workers: int):
        self._score = score
        self._threads = ThreadPoolExecutor(workers, "foveate-reward") if workers else None
        self._futures: dict[int, Future[RewardTable]] = {}
        self._waiting: dict[int, RolloutGroup] = {}

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if self._threads is not None:
            # An error must not wait for a judge; what is being scored ends by itself.
            self._threads.shutdown(wait=kind is None, cancel_futures=kind is not None)

    def submit(self, index: int, group: RolloutGroup) -> None:
        """Returns at once; index: the group's place among the results."""
        if self._threads is None:
            self._waiting[index] = group
        else:
            self._futures[index] = self._threads.submit(self._score, group)

    def results(self) -> dict[int, RewardTable]:
        """The table of every submitted group by its index, ascending; waits for them.

        Raises what `score` raised for the first of them, so that the order of finishing decides nothing.
        """
        if self._threads is None:
            return {index: self._score(self._waiting[index]) for index in sorted(self._waiting)}
        return {index: self._futures[index].result() for index in sorted(self._futures)}
