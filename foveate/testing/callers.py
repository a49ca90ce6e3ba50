"""Several callers of one engine: small requests, what came of them, and whether anything is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from foveate.rollout.config import SamplingParams
from foveate.rollout.types import Request, RolloutGroup

if TYPE_CHECKING:
    from foveate.rollout.engine import Engine

SECONDS = 60  # far beyond what anything here takes


def prompts(count: int, **sampling: Any) -> list[Request]:
    """Token-id prompts of several lengths; a seed of its own each, so that the order of adding decides nothing."""
    sampling = {"max_tokens": 6, "ignore_eos": True, **sampling}
    return [
        Request([1 + i] * (3 + i % 5), n=1 + i % 3, sampling=SamplingParams(seed=i, **sampling)) for i in range(count)
    ]


def tokens(groups: Iterable[RolloutGroup]) -> list[list[list[int]]]:
    """Of each rollout of each group."""
    return [[rollout.token_ids.tolist() for rollout in group.rollouts] for group in groups]


def steppers() -> list[threading.Thread]:
    """The threads that step an engine for asyncio."""
    return [thread for thread in threading.enumerate() if thread.name == "foveate-steps"]


def assert_idle(engine: Engine) -> None:
    """Nothing is left of any request, and the thread that stepped has ended."""
    for thread in steppers():
        thread.join(SECONDS)
    report, stats = engine.memory_report(), engine.stats()
    assert (report["kv_pages_used"], stats["running"], stats["waiting"]) == (0, 0, 0)
    assert not engine.has_unfinished
    assert not steppers()
