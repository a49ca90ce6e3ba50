"""Callers from asyncio: many wait, one thread steps the engine for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from foveate.rollout.desk import Desk
from foveate.rollout.types import Request, RolloutGroup

Submit = Callable[[Request, object], tuple[str, RolloutGroup | None]]  # `Engine._submit`


@dataclass(eq=False)
class _Call:
    """One caller: what came for it, in its own event loop. An item is (index, group), or why there is none."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[tuple[int, RolloutGroup] | BaseException] = field(default_factory=asyncio.Queue)
    indices: dict[str, int] = field(default_factory=dict)  # request id -> index, of those that are awaited
    is_closed: bool = False

    def put(self, item: tuple[int, RolloutGroup] | BaseException) -> None:
        with suppress(RuntimeError):  # its loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class Stepper:
    """Steps an engine on a thread of its own while a caller from asyncio waits for a request."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._calls: set[_Call] = set()  # those who wait; they own their requests at the desk
        self._has_thread = False

    async def run(
        self, submit: Submit, advance: Callable[[], None], requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, RolloutGroup]]:
        """Yields (index of the request, its group) as groups finish; aborts what is left when it is closed.

        submit: queues a request. advance: one step, whose results then lie at the desk.
        """
        call = _Call(asyncio.get_running_loop())
        try:
            for index, request in enumerate(requests):  # in order: seeds depend on it
                await asyncio.to_thread(self._enter, submit, advance, call, index, request)
            for _ in requests:
                item = await call.items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            call.is_closed = True
            self._desk.release(call)

    def _enter(self, submit: Submit, advance: Callable[[], None], call: _Call, index: int, request: Request) -> None:
        """Queues a request and sees to it that somebody steps."""
        name, refused = submit(request, call)
        if refused is not None:
            call.put((index, refused))
            return
        with self._desk.turn():
            if call.is_closed:
                self._desk.release(call)
                return
            call.indices[name] = index
            self._calls.add(call)
            if not self._has_thread:
                threading.Thread(target=self._drive, args=(advance,), name="foveate-steps").start()
                self._has_thread = True

    def _drive(self, advance: Callable[[], None]) -> None:
        while True:
            with self._desk.turn():
                self._calls = {call for call in self._calls if call.indices and not call.is_closed}
                if not self._calls:
                    self._has_thread = False
                    return
            try:
                advance()
                self._deliver()
            except BaseException as error:  # belongs to those who wait, not to this thread
                self._break_off(error)

    def _deliver(self) -> None:
        with self._desk.turn():
            for call in self._calls:
                for group in self._desk.take(call):
                    call.put((call.indices.pop(group.request_id), group))

    def _break_off(self, error: BaseException) -> None:
        """Raises in the callers whose requests ended with the step that broke off; in all, if none did."""
        with self._desk.turn():
            hit = {call for call in self._calls if self._desk.broken & call.indices.keys()}
            for call in hit or self._calls:
                call.put(error)
                call.indices.clear()
                self._desk.release(call)
