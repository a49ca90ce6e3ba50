"""A lock that threads get in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """Reentrant, and first come, first served: a thread that steps in a loop lets everyone in between two steps.

    threading.Lock promises no order; a loop that releases it and takes it again would keep others out.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._mutex:
            if self._owner in (None, thread):
                self._owner = thread
                self._depth += 1
                return
            turn = (thread, threading.Event())
            self._waiting.append(turn)
        try:
            turn[1].wait()
        except BaseException:  # an interrupt: this turn passes to the next one
            with self._mutex:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._release()
            raise

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            self._release()

    def _release(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._owner = None
        if self._waiting:
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.set()
