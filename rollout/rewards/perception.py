"""The visual perception reward: what the think part says about the image is true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.rollout.checks import require
from foveate.rollout.rewards.base import UNSCORABLE_REASONS
from foveate.rollout.rewards.grammar import Fact
from foveate.rollout.rewards.judge import Judge, RuleJudge, check_facts, judge_all
from foveate.rollout.types import Request, RolloutGroup


def annotated_facts(request: Request) -> tuple[Fact, ...]:
    """`request.metadata["facts"]` as facts: each entry a `Fact` or a (subject, value) pair of strings."""
    entries: Any = request.metadata.get("facts") or ()
    where = f"metadata['facts'] of request {request.request_id!r}"
    require(isinstance(entries, Sequence) and not isinstance(entries, str), "a list of facts", entries, where)
    for entry in entries:
        pair = isinstance(entry, Fact) or (
            isinstance(entry, (tuple, list)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        )
        require(pair, "facts or (subject, value) strings", entry, where)
    return tuple(entry if isinstance(entry, Fact) else Fact(*entry) for entry in entries)


class Perception:
    """The judge's score in [0, 1] of each rollout against the request's annotated facts.

    Applies only to requests that have annotations. None where the judge could not tell or failed, and for rollouts
    that were cut short from outside, which it is not asked about. Raises ValueError on a score outside [0, 1] and on
    annotations that the judge does not understand. Source: the visual perception reward of Perception-R1
    (arXiv 2506.07218), with the number of annotations as denominator.
    """

    name = "perception"

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge: Judge = RuleJudge() if judge is None else judge

    def applies(self, group: RolloutGroup) -> bool:
        """Whether the request has annotated facts."""
        return bool(group.request.metadata.get("facts"))

    def check(self, request: Request) -> None:
        """Raises ValueError for annotations that are no facts, or that the judge does not understand."""
        facts = annotated_facts(request)
        if facts:
            check_facts(self.judge, facts, f"request {request.request_id!r}")

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        self.check(group.request)
        facts = annotated_facts(group.request)
        texts = [r.text for r in group.rollouts if r.finish_reason not in UNSCORABLE_REASONS]
        scores = iter(judge_all(self.judge, texts, facts))
        return [None if r.finish_reason in UNSCORABLE_REASONS else next(scores) for r in group.rollouts]
