"""What all judges that are language models have in common: whom they ask what, and what counts as an answer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from foveate.rollout.rewards.grammar import Fact
from foveate.rollout.rewards.judge_prompt import MAX_TEXT_CHARS, Question, ask, read
from foveate.rollout.rewards.text import think_part

logger = logging.getLogger("foveate.rewards")


class ModelJudge(ABC):
    """Share of the annotated facts that a text states, in a language model's judgement; None if it gives none.

    part: the text of a reply that is judged, by default its think part. A reply without one, or with one of more than
    32,768 characters, scores 0 unasked: the policy writes it, so that is the policy's own failure. Replies that read
    the same are judged once. Whatever the model writes beyond the JSON it was asked for makes a reply unscorable.
    """

    def __init__(self, part: Callable[[str], str | None] = think_part) -> None:
        self.part = part

    def __call__(self, response: str, facts: Sequence[Fact]) -> float | None:
        """The score of one reply."""
        return self.judge_all([response], facts)[0]

    def judge_all(self, responses: Sequence[str], facts: Sequence[Fact]) -> list[float | None]:
        """The score of each reply against the same facts."""
        texts = [self.part(response) for response in responses]
        judged = list(dict.fromkeys(text for text in texts if text is not None and len(text) <= MAX_TEXT_CHARS))
        questions = [ask(text, facts) for text in judged]
        answers = self._answers(questions) if questions else []
        scores: dict[str | None, float | None] = {}
        failures = []
        for text, question, answer in zip(judged, questions, answers, strict=True):
            scores[text] = None
            try:
                if isinstance(answer, Exception):
                    raise answer
                scores[text] = read(answer, question.ids)
            except Exception as error:  # any reason why there is no verdict
                failures.append(error)
        if failures:
            logger.warning("%d of %d judgements failed, the first: %r", len(failures), len(judged), failures[0])
        return [scores.get(text, 0.0) for text in texts]

    @abstractmethod
    def _answers(self, questions: Sequence[Question]) -> Sequence[str | Exception]:
        """The model's reply to each question, or why there is none."""
