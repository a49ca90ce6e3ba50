"""An asyncio event loop in a thread of its own, for coroutines that synchronous code waits for."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
Ending = Callable[[], Coroutine[Any, Any, None]]


class BackgroundLoop:
    """Runs coroutines for any number of threads; the thread starts when first needed and ends with its owner.

    After a fork the copy starts a thread and a loop of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._endings: list[Ending] = []  # of the running loop
        self._owner = 0

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result; an interrupt of the waiting thread cancels it.

        Raises `concurrent.futures.CancelledError` if the loop was closed before there was one.
        """
        with self._lock:  # a loop that `close` has stopped would never run it
            future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, ending: Ending | None = None) -> None:
        """Cancels what runs on the loop, runs `ending` there, and waits until the thread has ended."""
        thread = self._stop([] if ending is None else [ending])
        if thread is not None:
            thread.join()

    def __del__(self) -> None:
        self._stop([])  # may be called on the loop's own thread: no waiting

    def _stop(self, endings: list[Ending]) -> threading.Thread | None:
        """The thread that is now about to end; None if there is none, or if it belongs to the process before a fork."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is None or self._owner != os.getpid():
                return None
            self._endings.extend(endings)
            loop.call_soon_threadsafe(loop.stop)
            return self._thread

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._owner != os.getpid():
            self._loop, self._owner, self._endings = asyncio.new_event_loop(), os.getpid(), []
            work = (self._loop, self._endings)
            self._thread = threading.Thread(target=_serve, args=work, name="foveate-judge", daemon=True)
            self._thread.start()
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop, endings: list[Ending]) -> None:
    """Until the loop is stopped; what was submitted before then is a task by now, and is cancelled."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    while tasks := asyncio.all_tasks(loop):
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks))
    for ending in endings:
        loop.run_until_complete(ending())
    loop.run_until_complete(asyncio.sleep(0))  # the waiting threads are told of their tasks' ends in callbacks
    loop.close()
