"""Facts, grammars that find them in text, and the grammar of labelled values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from foveate.rollout.checks import require


class Fact(NamedTuple):
    """One thing that an image shows: a subject and its value, both text in a grammar's canonical form."""

    subject: str
    value: str


class Grammar(Protocol):
    """A closed language of facts: what it does not know is no statement."""

    def statements(self, text: str) -> set[Fact]:
        """The different facts that the text states, in canonical form. Never raises, linear in the text."""
        ...

    def canonical(self, fact: Fact) -> Fact | None:
        """An annotated fact in canonical form, None if the grammar does not know it."""
        ...


# A comparison ("3 < x") is no markup: a tag's name follows its bracket at once.
MARKUP = re.compile(r"</?[A-Za-z!?][^<>]*>")

PLACES = (
    *("top-left", "top", "top-right", "left", "center", "centre", "middle", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)


def strip_markup(text: str) -> str:
    """The text with every `<tag>` replaced by a space; tags need not match."""
    return MARKUP.sub(" ", text)


class LabelGrammar:
    """Statements `subject [link] value`, for example `top-left 3` or `top-left: 3` or `top-left is 3`.

    subject: one of `subjects` (lower case, whole words). link: `is`, `shows`, `has`, `contains`, `=` or `:`,
    at most one. value: a decimal number without sign (leading zeros and a zero fraction dropped) or one of
    `values`. Case and markup are ignored; quotes, asterisks, brackets and dollar signs read as spaces.
    """

    # Words end at white space and ASCII punctuation only, so that no look-alike leaves a readable rest.
    _TOKEN = re.compile(r"[,;:=!?/|<>+#&%~^@\\]|\.(?!\S)|(?:[^\s,;:=!?/|<>+#&%~^@\\.]|\.(?=\S))+")
    _NUMBER = re.compile(r"0*([0-9]+?)(?:\.([0-9]*?)0*)?")
    _MAX_VALUE_CHARS = 32
    _LINKS = frozenset({"is", "shows", "has", "contains", "=", ":"})
    _SPACES = str.maketrans(dict.fromkeys("\"'`*_{}[]()$", " "))

    def __init__(self, subjects: Iterable[str] = PLACES, values: Iterable[str] = ()) -> None:
        self.subjects, self.values = frozenset(subjects), frozenset(values)
        for word in self.subjects | self.values:
            whole = self._TOKEN.fullmatch(word) is not None and word == word.lower()
            require(whole, "one lower-case word without spaces", word, "subjects, values")
        require(bool(self.subjects), "at least one subject", subjects, "subjects")

    def statements(self, text: str) -> set[Fact]:
        tokens = self._TOKEN.findall(strip_markup(text).lower().translate(self._SPACES))
        found = set()
        for i, subject in enumerate(tokens):
            if subject in self.subjects:
                following = tokens[i + 1 : i + 3]
                value = self._value(following[1:] if following[:1] and following[0] in self._LINKS else following)
                if value is not None:
                    found.add(Fact(subject, value))
        return found

    def canonical(self, fact: Fact) -> Fact | None:
        subject, value = fact.subject.strip().lower(), self._value([fact.value.strip().lower()])
        return Fact(subject, value) if subject in self.subjects and value is not None else None

    def _value(self, tokens: list[str]) -> str | None:
        # Longer digit strings are no readings, and would cost more than linear time.
        if not tokens or len(tokens[0]) > self._MAX_VALUE_CHARS:
            return None
        number = self._NUMBER.fullmatch(tokens[0])
        if number is not None:
            return f"{number[1]}.{number[2]}" if number[2] else number[1]
        return tokens[0] if tokens[0] in self.values else None
