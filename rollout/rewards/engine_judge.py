"""A judge that is a second engine in the same process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import takewhile

from foveate.rollout.config import SamplingParams
from foveate.rollout.engine import Engine
from foveate.rollout.rewards.grammar import Fact
from foveate.rollout.rewards.judge_prompt import Question, ask
from foveate.rollout.rewards.model_judge import ModelJudge
from foveate.rollout.rewards.text import think_part
from foveate.rollout.types import Request, RolloutGroup


class EngineJudge(ModelJudge):
    """Asks an engine's model, greedily, which of the facts a reply states; the instruction is computed once a batch.

    engine: of the judge model, with a tokenizer that has a chat template; nothing else may use it meanwhile. The
    tokens up to the question are a segment of their own (`Request.prefix_len`), which all questions of one call
    share. A reply of the model that is not the JSON it was asked for, and a request that fails, make None. Safe to
    share between threads, which take turns. part: see `ModelJudge`. Raises ValueError for an engine that cannot
    render chat messages.
    """

    def __init__(self, engine: Engine, *, part: Callable[[str], str | None] = think_part) -> None:
        super().__init__(part)
        self.engine = engine
        self._lock = threading.Lock()
        self._prefix_len = self._shared_tokens()

    def _answers(self, questions: Sequence[Question]) -> Sequence[str | Exception]:
        requests = [
            Request(
                question.messages,
                sampling=SamplingParams(temperature=0.0, max_tokens=question.max_tokens),
                prefix_len=self._prefix_len,
            )
            for question in questions
        ]
        with self._lock:
            groups = self.engine.generate(requests, progress=False)
        return [_answer(group) for group in groups]

    def _shared_tokens(self) -> int:
        """How many tokens every question begins with: those before the first that depends on the user message."""
        messages = ask("", [Fact("", "")]).messages
        variants = [messages, [messages[0], {"role": "user", "content": "0"}]]
        first, second = (self.engine._processor.prepare(Request(variant)).token_ids.tolist() for variant in variants)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _answer(group: RolloutGroup) -> str | Exception:
    return group.error if group.error is not None else group.rollouts[0].text
