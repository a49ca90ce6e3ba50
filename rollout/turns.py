"""A lock that threads get in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """Reentrant, and first come, first served: a thread that steps in a loop lets everyone in between two steps.

    threading.Lock promises no order; a loop that releases it and takes it again would keep others out. Nothing is
    allocated while the inner lock is held: a collection of garbage there could run an iterator's end, which asks again.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()  # (thread, held until its turn comes)
        self._owner: int | None = None
        self.depth = 0

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    def try_enter(self) -> bool:
        """Takes the turn if nobody has it, not even the calling thread; never blocks. To be ended by `__exit__`."""
        thread = threading.get_ident()
        if not self._mutex.acquire(blocking=False):
            return False
        try:
            is_free = self._owner is None
            if is_free:
                self._owner, self.depth = thread, 1
            return is_free
        finally:
            self._mutex.release()

    def __enter__(self) -> None:
        thread, gate = threading.get_ident(), threading.Lock()
        gate.acquire()
        turn = (thread, gate)
        with self._mutex:
            if self._owner in (None, thread):
                self._owner = thread
                self.depth += 1
                return
            self._waiting.append(turn)
        try:
            gate.acquire()
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
        self.depth -= 1
        if self.depth:
            return
        self._owner = None
        if self._waiting:
            self._owner, gate = self._waiting.popleft()
            self.depth = 1
            gate.release()
