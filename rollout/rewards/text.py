"""The parts of a reply `<think>...</think> <answer>...</answer>`, found in linear time."""

from __future__ import annotations

import re

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
_BRACE = re.compile(r"\\boxed\{|[{}]")


def think_part(text: str) -> str | None:
    """Text between the first `<think>` and the first `</think>` after it; None if one of them is missing."""
    start = text.find(THINK)
    end = text.find(END_THINK, start + len(THINK))
    return None if start < 0 or end < 0 else text[start + len(THINK) : end]


def answer_part(text: str) -> str | None:
    """Text of the last `<answer>...</answer>` after the think part; None if there is none.

    Without a think part the whole text is searched. The last closing tag counts, with the opening tag
    nearest before it.
    """
    think = text.find(END_THINK, text.find(THINK) + len(THINK)) if THINK in text else -1
    rest = text[think + len(END_THINK) :] if think >= 0 else text
    end = rest.rfind(END_ANSWER)
    start = rest.rfind(ANSWER, 0, max(end, 0))
    return None if end < 0 or start < 0 else rest[start + len(ANSWER) : end]


def has_box(text: str) -> bool:
    """Whether the text holds a `\\boxed{...}` that is closed and not blank."""
    openings: list[int | None] = []  # per open brace: where a box's content begins, None for other braces
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            openings.append(match.end() if match[0] != "{" else None)
        elif openings:
            begin = openings.pop()
            if begin is not None and text[begin : match.start()].strip():
                return True
    return False
