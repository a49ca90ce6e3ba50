"""The event loop in a thread of its own: closed at any moment, it lets nobody wait."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

from foveate.rollout.rewards import background
from foveate.rollout.rewards.background import BackgroundLoop


def test_close_while_a_coroutine_is_handed_over_lets_nobody_wait(monkeypatch):
    """`close` comes between the choice of the loop and the submission to it."""
    loop, found, submit = BackgroundLoop(), [], asyncio.run_coroutine_threadsafe

    async def quick():
        return 1

    def slowly(coroutine, chosen):
        closing.start()
        closing.join(0.3)
        return submit(coroutine, chosen)

    def work():
        try:
            found.append(loop.run(quick()))
        except CancelledError:
            found.append("cancelled")

    assert loop.run(quick()) == 1
    closing = threading.Thread(target=loop.close, daemon=True)
    monkeypatch.setattr(background.asyncio, "run_coroutine_threadsafe", slowly)
    waiting = threading.Thread(target=work, daemon=True)
    waiting.start()
    waiting.join(10)
    closing.join(10)
    assert found in ([1], ["cancelled"])
    monkeypatch.undo()
    assert loop.run(quick()) == 1
    loop.close()


def test_what_a_closed_loop_ran_is_cancelled_and_its_ending_comes_last():
    loop, found, events = BackgroundLoop(), [], []

    async def endless(started):
        try:
            started.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            events.append("cancelled")
            raise

    async def ending():
        events.append("ending")

    def work(started):
        try:
            loop.run(endless(started))
        except CancelledError:
            found.append("cancelled")

    started = [threading.Event() for _ in range(3)]
    threads = [threading.Thread(target=work, args=(event,), daemon=True) for event in started]
    for thread in threads:
        thread.start()
    for event in started:
        assert event.wait(10)
    loop.close(ending)
    assert events == ["cancelled"] * 3 + ["ending"]  # when it returns
    for thread in threads:
        thread.join(10)
    assert found == ["cancelled"] * 3
    loop.close(ending)  # there is nothing to end
    assert len(events) == 4
