"""Callers from asyncio: many wait, one thread steps the engine for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foveate.rollout import output
from foveate.rollout.types import Request, RolloutGroup

if TYPE_CHECKING:
    from foveate.rollout.engine import Engine


@dataclass(eq=False)
class _Call:
    """One caller: what came for it, in its own event loop. An item is (index, group) or why there is none."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[tuple[int, RolloutGroup | BaseException | None]] = field(default_factory=asyncio.Queue)
    is_closed: bool = False

    def put(self, index: int, item: RolloutGroup | BaseException | None) -> None:
        if not self.is_closed and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.items.put_nowait, (index, item))


class Stepper:
    """Steps the engine on a thread of its own while a caller from asyncio waits for a request."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[_Call, int]] = {}  # by request id: who waits, index among its requests
        self._steps = False

    async def run(self, engine: Engine, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, RolloutGroup]]:
        """Yields (index of the request, its group) as groups finish; aborts what is left when it is closed."""
        call = _Call(asyncio.get_running_loop())
        try:
            entering = [asyncio.to_thread(self._enter, engine, call, index, r) for index, r in enumerate(requests)]
            for entered in entering:  # in order: seeds depend on it
                await entered
            for _ in requests:
                index, item = await call.items.get()
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield index, item
        finally:
            for entered in entering:
                entered.close()
            await asyncio.shield(asyncio.to_thread(self._leave, engine, call))

    def _enter(self, engine: Engine, call: _Call, index: int, request: Request) -> None:
        """Adds a request and sees to it that somebody steps."""
        name = engine._name(request)
        try:
            group = engine._prepare(request, name)
            with engine._turns:
                if call.is_closed:
                    return
                engine._enter(group)
                self._calls[name] = call, index
                if not self._steps:
                    self._steps = True
                    threading.Thread(target=self._drive, args=(engine,), name="foveate-steps").start()
        except ValueError as error:
            call.put(index, engine._refused(request, name, error))

    def _leave(self, engine: Engine, call: _Call) -> None:
        with engine._turns:
            call.is_closed = True
            names = {name for name, (owner, _) in self._calls.items() if owner is call}
            engine._forget(names)
            for name in names:
                del self._calls[name]

    def _drive(self, engine: Engine) -> None:
        while True:
            with engine._turns:
                if not self._calls:
                    self._steps = False
                    return
                try:
                    groups = engine._step_for(self._calls)
                except BaseException as error:  # belongs to those who wait, not to this thread
                    self._break_off(engine, error)
                    continue
                for group in groups:
                    call, index = self._calls.pop(group.request_id)
                    call.put(index, group)
                for name in [name for name in self._calls if not engine._is_taken(name)]:
                    call, index = self._calls.pop(name)  # somebody's own step() has taken it
                    call.put(index, None)

    def _break_off(self, engine: Engine, error: BaseException) -> None:
        """Raises in the callers whose requests ended with the step that broke off; in all, if none did."""
        failed = {group.request_id for group in engine._outbox if group.error is not None}
        calls = {call for name, (call, _) in self._calls.items() if name in failed}
        for call in calls or {call for call, _ in self._calls.values()}:
            call.put(0, error)
            self._leave(engine, call)


class AsyncCalls:
    """What an engine offers to asyncio."""

    _stepper: Stepper

    async def generate_async(self: Engine, requests: Sequence[Request], *, strict: bool = False) -> list[RolloutGroup]:  # type: ignore[misc]
        """`generate` for asyncio: any number of calls may wait at a time and are served together.

        Steps run on a thread of the engine's, so that the event loop stays free. Cancelling the call aborts its
        requests. An exception of a step is raised in the calls whose requests it ended.
        """
        requests = list(requests)
        finished = {index: group async for index, group in self._stepper.run(self, requests)}
        return output.in_order(finished, len(requests), strict)

    async def stream_async(self: Engine, requests: Sequence[Request]) -> AsyncIterator[RolloutGroup]:  # type: ignore[misc]
        """`stream` for asyncio: yields each group as it finishes; closing the iterator aborts what is left."""
        groups = self._stepper.run(self, list(requests))
        try:
            async for _, group in groups:
                yield group
        finally:
            await groups.aclose()
