"""Scores finished groups on threads of their own while others decode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType

from foveate.rollout.rewards import RewardTable
from foveate.rollout.types import RolloutGroup

Score = Callable[[RolloutGroup], RewardTable]
Job = tuple[Future[RewardTable], RolloutGroup]


class RewardPool:
    """Calls `score` with each submitted group; used once, as a context.

    workers: groups that are scored at a time; the others queue in the order they came. 0 scores when the results are
    asked for, one after another in the caller's thread. Leaving the context by an exception drops what is queued and
    waits for nothing; the threads are daemons, so that the process does not wait for a running reward either.
    """

    def __init__(self, score: Score, workers: int):
        self._score, self._workers = score, workers
        self._threads: list[threading.Thread] = []
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._futures: dict[int, Future[RewardTable]] = {}
        self._waiting: dict[int, RolloutGroup] = {}

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        if kind is not None:
            for future in self._futures.values():
                future.cancel()
        for _thread in self._threads:
            self._queue.put(None)
        for thread in self._threads if kind is None else []:
            thread.join()

    def submit(self, index: int, group: RolloutGroup) -> None:
        """Returns at once; index: the group's place among the results."""
        if self._workers == 0:
            self._waiting[index] = group
            return
        future = self._futures[index] = Future()
        self._queue.put((future, group))
        if len(self._threads) < self._workers:
            # Not concurrent.futures.ThreadPoolExecutor: the interpreter joins its threads before it exits.
            name, work = f"foveate-reward-{len(self._threads)}", (self._score, self._queue)
            self._threads.append(threading.Thread(target=_serve, args=work, name=name, daemon=True))
            self._threads[-1].start()

    def results(self) -> dict[int, RewardTable]:
        """The table of every submitted group by its index, ascending; waits for them.

        Raises what `score` raised for the first of them, so that the order of finishing decides nothing.
        """
        if self._workers == 0:
            return {index: self._score(self._waiting[index]) for index in sorted(self._waiting)}
        return {index: self._futures[index].result() for index in sorted(self._futures)}


def _serve(score: Score, queue: SimpleQueue[Job | None]) -> None:
    """Until None comes; whatever a reward raises belongs to its future."""
    while (job := queue.get()) is not None:
        future, group = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(score(group))
        except BaseException as error:
            future.set_exception(error)
