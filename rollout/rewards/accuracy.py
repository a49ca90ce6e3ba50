"""The accuracy reward: the reply's answer equals the known one, as math-verify sees it."""

from __future__ import annotations

import importlib.util
import re

from foveate.rollout.checks import require
from foveate.rollout.rewards.math_process import MathProcess
from foveate.rollout.rewards.text import answer_part
from foveate.rollout.types import Request, RolloutGroup

MAX_ANSWER_CHARS = 1_000
CACHE_ENTRIES = 65_536
PLAIN_INTEGER = re.compile(r"\s*(?:\\boxed\{\s*(-?[0-9]{1,15})\s*\}|(-?[0-9]{1,15}))\s*")


def _plain_integer(text: str) -> int | None:
    match = PLAIN_INTEGER.fullmatch(text)
    return int(match[1] or match[2]) if match else None


class Accuracy:
    r"""1 if the rollout's answer equals `request.metadata["answer"]`, else 0.

    The answer is the text of the last `<answer>...</answer>` after the think part, line breaks included; the
    rest of the reply is never looked at. Two boxes are a set of two values, so listing guesses is wrong.
    0: no answer, one of more than 1,000 characters, one that math-verify cannot read or that takes it longer
    than `timeout_seconds` twice; the policy writes the answer, so its failures are the policy's own.
    None (unscorable): the request has no answer to compare with, or math-verify cannot read that one in time.
    The comparison runs in a child process with a time and memory limit: it works in any thread, hostile
    answers (`9^{9^{9^9}}`) cannot hang it, and no signal handler is touched. Plain integers skip it.
    Raises ImportError when math-verify is missing, ValueError when the known answer is not a string.
    """

    name = "accuracy"

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        require(timeout_seconds > 0, "seconds > 0", timeout_seconds, "timeout_seconds")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("expected math-verify to be installed: pip install 'foveate[train]'")
        self._process = MathProcess(timeout_seconds)
        self._known: dict[tuple[str, str], float | None] = {}

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        self.check(group.request)
        gold = group.request.metadata.get("answer")
        if gold is None:
            return [None] * len(group.rollouts)
        return [self.score(rollout.text, gold) for rollout in group.rollouts]

    def check(self, request: Request) -> None:
        """Raises ValueError when the known answer is there and not a string."""
        gold = request.metadata.get("answer")
        where = f"metadata['answer'] of request {request.request_id!r}"
        require(gold is None or isinstance(gold, str), "a string", gold, where)

    def score(self, text: str, gold: str) -> float | None:
        """The value of one reply against one known answer."""
        answer = answer_part(text)
        if answer is None or len(answer) > MAX_ANSWER_CHARS:
            # An unreadable gold must be unscorable for every member of the group alike.
            return 0.0 if self._equal(gold, "") is not None else None
        return self._equal(gold, answer)

    def _equal(self, gold: str, answer: str) -> float | None:
        known, given = _plain_integer(gold), _plain_integer(answer)
        if known is not None and (given is not None or not answer.strip()):
            return float(known == given)
        key = (gold, answer)
        if key not in self._known:
            verdict = self._process.compare(gold, answer)
            if verdict == "timeout":  # depends on the machine's load: not remembered
                return self._after_timeout(gold, answer)
            if len(self._known) >= CACHE_ENTRIES:
                self._known.clear()
            self._known[key] = {"equal": 1.0, "different": 0.0, "unreadable": None}[verdict]
        return self._known[key]

    def _after_timeout(self, gold: str, answer: str) -> float | None:
        """Once more, in a new child: None if the known answer alone is too much for it, 0 if the given one is."""
        if self._process.compare(gold, "") == "timeout":
            return None
        return {"equal": 1.0, "different": 0.0, "timeout": 0.0, "unreadable": None}[self._process.compare(gold, answer)]

    def close(self) -> None:
        """Ends the child process; the next comparison starts a new one."""
        self._process.close()
