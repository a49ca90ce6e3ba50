"""The format reward: the reply is one think part, then one answer with a box."""

from __future__ import annotations

from foveate.rollout.rewards.text import ANSWER, END_ANSWER, END_THINK, THINK, has_box
from foveate.rollout.types import RolloutGroup


def follows_format(text: str) -> bool:
    """Whether the whole text is `<think>...</think>`, white space, `<answer>...\\boxed{...}...</answer>`.

    Each tag stands exactly once, the box is closed and not blank; white space around is allowed. The released
    code of Perception-R1 also asks for line breaks inside the tags, which says nothing about the content.
    """
    if any(text.count(tag) != 1 for tag in (THINK, END_THINK, ANSWER, END_ANSWER)):
        return False
    text = text.strip()
    if not (text.startswith(THINK) and text.endswith(END_ANSWER)):
        return False
    end_think, answer = text.find(END_THINK), text.find(ANSWER)
    between = text[end_think + len(END_THINK) : max(answer, 0)]
    return end_think < answer and not between.strip() and has_box(text[answer + len(ANSWER) : -len(END_ANSWER)])


class Format:
    """1 for a rollout whose text follows the format (`follows_format`), else 0; never unscorable."""

    name = "format"

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        return [float(follows_format(rollout.text)) for rollout in group.rollouts]
