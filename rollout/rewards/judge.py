"""Judges: how much of what an image shows does a reply say, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from foveate.rollout.checks import require
from foveate.rollout.rewards.geometry import GeometryGrammar
from foveate.rollout.rewards.grammar import Fact, Grammar, LabelGrammar
from foveate.rollout.rewards.text import think_part

logger = logging.getLogger("foveate.rewards")
JudgeAll = Callable[[Sequence[str], Sequence[Fact]], list[float | None]]


class Judge(Protocol):
    """Scores a reply against annotated facts: a float in [0, 1], or None if it cannot tell (unscorable).

    response: the whole reply. A judge that fails (a timeout, an answer it cannot read) returns None. It may also
    define `judge_all(responses, facts) -> list[float | None]`, which is then called once with all replies of a group,
    and `check(facts)`, which raises ValueError for annotations that it does not understand.
    """

    def __call__(self, response: str, facts: Sequence[Fact]) -> float | None: ...


def judge_all(judge: Judge, responses: Sequence[str], facts: Sequence[Fact]) -> list[float | None]:
    """The judge's score of each reply; None, with a warning in the log, where it raises.

    Raises ValueError if `judge.check` refuses the facts, and for another number of scores or one outside [0, 1].
    """
    check_facts(judge, facts, "judge_all")
    together = getattr(judge, "judge_all", None)
    if together is None:
        scores = [score for response in responses for score in _attempt(_one_by_one(judge), [response], facts)]
    else:
        scores = _attempt(together, responses, facts)
    require(len(scores) == len(responses), f"{len(responses)} scores", len(scores), "judge")
    for score in scores:
        require(score is None or 0 <= score <= 1, "a score in [0, 1] or None", score, "judge")
    return scores


def check_facts(judge: Judge, facts: Sequence[Fact], where: str) -> None:
    """Raises ValueError if `judge.check` refuses the facts, with `where` in the message."""
    check = getattr(judge, "check", None)
    if check is not None:
        try:
            check(facts)
        except ValueError as error:
            raise ValueError(f"{error}, {where}") from error


def _one_by_one(judge: Judge) -> JudgeAll:
    return lambda responses, facts: [judge(response, facts) for response in responses]


def _attempt(judge: JudgeAll, responses: Sequence[str], facts: Sequence[Fact]) -> list[float | None]:
    try:
        return list(judge(responses, facts))
    except Exception as error:  # whatever a judge raises, the step goes on without its score
        logger.warning("%d replies are unscorable, the judge raised %r", len(responses), error)
        return [None] * len(responses)


class RuleJudge:
    """Judges by a grammar of "subject value" statements, without a model; never unscorable.

    score = hits / max(#annotated facts, #stated facts). A fact is hit if the think part states its value for
    its subject, and no value for that subject that is not annotated. Stated facts are the different (subject,
    value) pairs that the grammars find in the think part (the text between the first `<think>` and the first
    `</think>` after it); a reply without these tags states nothing and scores 0. Every subject of a grammar
    has at least two values, so stating everything hits nothing and scores 0.
    Subjects and values come from the grammars, never from the reply: markup, JSON, instructions to a judge
    and look-alike characters are no statements. Time is linear in the length of the reply.
    Raises ValueError when there are no facts or one is outside the grammars.
    """

    def __init__(self, grammars: Sequence[Grammar] = (LabelGrammar(), GeometryGrammar())) -> None:
        require(len(grammars) > 0, "at least one grammar", grammars, "grammars")
        self.grammars = tuple(grammars)

    def __call__(self, response: str, facts: Sequence[Fact]) -> float:
        annotated = self._annotated(facts)
        text = think_part(response)
        if text is None:
            return 0.0
        stated = {fact for grammar in self.grammars for fact in grammar.statements(text)}
        contradicted = {fact.subject for fact in stated - annotated}
        hits = sum(fact in stated and fact.subject not in contradicted for fact in annotated)
        return hits / max(len(annotated), len(stated))

    def check(self, facts: Sequence[Fact]) -> None:
        """Raises ValueError when there are no facts or one is outside the grammars."""
        self._annotated(facts)

    def _annotated(self, facts: Sequence[Fact]) -> set[Fact]:
        require(len(facts) > 0, "at least one annotated fact", facts, "facts")
        found: set[Fact] = set()
        for fact in facts:
            canonical = next((c for g in self.grammars if (c := g.canonical(fact)) is not None), None)
            if canonical is None:
                raise ValueError(f"expected a fact of the judge's grammars, got {fact!r} (facts)")
            found.add(canonical)
        return found
