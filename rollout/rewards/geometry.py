r"""The grammar of what a geometry diagram shows: lengths, angles, arcs, incidence, right angles, parallels.

Statements, one to a line or separated by punctuation or words (`P` is a point: a capital, perhaps primed):

    measured  := PQ | angle PQR | angle P | angle 1 | arc PQ | arc PQR   (segment, line, side may precede PQ)
    statement := measured (= | : | is | equals | measures | is equal to | has length | has measure) expression
               | measured (= | is | equals | is equal to | is congruent to) measured
               | measured (≠ | is not equal to | does not equal) measured
               | P (lies on | is on | does not lie on | is not on) (PQ | circle P)
               | PQ [is] [not] (perpendicular | parallel) to PQ
    expression:  sums, products and quotients of numbers, lower-case variables, \sqrt{n} and \frac{a}{b}

Symbols and LaTeX read like the words: ∠ \angle ⊥ \perp ∥ || \parallel ≅ \cong √ \overline{PQ} \widehat{PQ}.
Degree signs and spaces inside expressions are dropped; segment, angle and arc ends are put in order. After a
joined pair reading goes on at its second subject ("AB = CD = 5" also states CD = 5); after a value it goes on
behind it ("AB = x+21 = 35" states AB = x+21). Facts are (`PQ`, `x+21`), (`angle PQR`, `60`),
(`lengths PQ, RS`, `equal` | `unequal`), also for angles and arcs, (`lines PQ, RS`, `perpendicular` |
`parallel` | `not perpendicular` | `not parallel`), (`R on line PQ`, `yes` | `no`), (`R on circle P`, `yes` |
`no`): each subject has several values, so that stating all of them contradicts itself.
"""

from __future__ import annotations

import re

from foveate.rollout.rewards.expression import read_expression
from foveate.rollout.rewards.grammar import Fact, strip_markup

# A character outside ASCII is part of a word, so that no look-alike leaves a readable rest.
_TOKEN = re.compile(r"\n|\\[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|(?:[A-Za-z]|[^\x00-\x7f\s])(?:[\w']|[^\x00-\x7f\s])*|\|\||\S")
_POINTS = re.compile(r"(?:[A-Z]'?){1,3}")
_SYMBOLS = str.maketrans(
    dict.fromkeys('"`$°△', " ")
    | {"∠": r" \angle ", "⊥": r" \perp ", "∥": r" \parallel ", "≅": r" \cong ", "≠": r" \neq "}
    | {"√": r"\sqrt ", "−": "-", "·": "*", "×": "*", "²": "^2", "⊙": " circle ", "—": ",", "–": "-", "’": "'"}
)
_LATEX = (
    (re.compile(r"\*\*|__|\\[()\[\],;! ]|\\(?:left|right)\b|\^(?:\\circ|\{\\circ\})"), " "),
    (
        re.compile(r"\\(?:overline|overleftrightarrow|overrightarrow|text|mathrm)\{([A-Za-z' ]{1,12})\}"),
        r" \1 ",
    ),
    (re.compile(r"\\(?:widehat|overarc|overset\{\\frown\})\{([A-Z' ]{2,12})\}"), r" arc \1 "),
)
# What joins two subjects -> the value of the relation between them. "=" also joins a subject and a value.
_JOINS: dict[tuple[str, ...], str] = {
    **dict.fromkeys([("=",), (":",), ("is",), ("equals",), ("measures",), (r"\cong",)], "equal"),
    **dict.fromkeys([("is", "equal", "to"), ("is", "congruent", "to"), ("has", "length")], "equal"),
    **dict.fromkeys([("has", "measure")], "equal"),
    **dict.fromkeys([("is", "not", "equal", "to"), ("does", "not", "equal")], "unequal"),
    **{(r"\neq",): "unequal", (r"\ne",): "unequal"},
    **{(r"\perp",): "perpendicular", (r"\parallel",): "parallel", ("||",): "parallel"},
    **{
        (*verb, *no, word, "to"): " ".join((*no, word))
        for word in ("perpendicular", "parallel")
        for verb, no in (((), ()), (("is",), ()), (("is",), ("not",)))
    },
    **{("lies", "on"): "yes", ("is", "on"): "yes"},
    **{("does", "not", "lie", "on"): "no", ("is", "not", "on"): "no"},
}
_LONGEST_JOIN = max(map(len, _JOINS))
_RELATIONS = (
    (re.compile(r"(?:lengths|angles|arcs|lines) ([^,]+), ([^,]+)"), "{0} {join} {1}"),
    (re.compile(r"(\S+) on line (\S+)"), "{0} {join} {1}"),
    (re.compile(r"(\S+) on circle (\S+)"), "{0} {join} circle {1}"),
)
_WORDING = {"equal": "=", "unequal": r"\neq", "yes": "lies on", "no": "does not lie on"}
_NOUNS = {"segment", "line", "side"}
_LOGIC = (
    (re.compile(r"\bLine\(([^(),]+),([^(),]+)\)"), r" \1\2"),
    (re.compile(r"\bAngle\(([^(),]+),([^(),]+),([^(),]+)\)"), r" angle \1\2\3"),
    (re.compile(r"\bAngle\(([^(),]+)\)"), r" angle \1"),
    (re.compile(r"\bArc\(([^(),]+),([^(),]+)(?:,([^(),]+))?\)"), r" arc \1\2\3"),
    (re.compile(r"\bCircle\(([^(),]+)(?:,[^(),]*)?\)"), r"\1"),
    (re.compile(r"(?:LengthOf|MeasureOf)\(([^(),]+)\)"), r"\1"),
    (re.compile(r"Equals\(([^(),]+),([^(),]+)\)"), r"\1 = \2"),
    (re.compile(r"PointLiesOnLine\(([^(),]+),([^(),]+)\)"), r"\1 lies on \2"),
    (re.compile(r"PointLiesOnCircle\(([^(),]+),([^(),]+)\)"), r"\1 lies on circle \2"),
    (re.compile(r"Perpendicular\(([^(),]+),([^(),]+)\)"), r"\1 is perpendicular to \2"),
    (re.compile(r"Parallel\(([^(),]+),([^(),]+)\)"), r"\1 is parallel to \2"),
)


class GeometryGrammar:
    """Statements about a geometry diagram; the module's docstring has the grammar."""

    def statements(self, text: str) -> set[Fact]:
        tokens = _tokens(strip_markup(text))
        found, i = set(), 0
        while i < len(tokens):
            read = _read_statement(tokens, i)
            if read is not None:
                found.add(read[0])
            i = i + 1 if read is None else read[1]
        return found

    def canonical(self, fact: Fact) -> Fact | None:
        return _read_whole(describe(fact))


def describe(fact: Fact) -> str:
    """The sentence of the grammar that states a fact."""
    for pattern, sentence in _RELATIONS:
        match = pattern.fullmatch(fact.subject)
        if match is not None:
            join = _WORDING.get(fact.value, f"is {fact.value} to")
            return sentence.format(*match.groups(), join=join)
    return f"{fact.subject} = {fact.value}"


def diagram_fact(form: str) -> Fact | None:
    """The fact of a logic form as Geometry3K writes it; None if the grammar has no statement for it.

    For example `Equals(LengthOf(Line(T, R)), x+21)` is Fact("RT", "x+21"). Source of the forms: Inter-GPS
    (arXiv 2105.04165).
    """
    # "angle 1" is a name with a space; all other spaces are optional in the forms.
    text = "".join(form.replace("angle ", "Angle:").split()).replace("Angle:", " angle ")
    for pattern, sentence in _LOGIC:
        text = pattern.sub(sentence, text)
    return _read_whole(text)


def _tokens(text: str) -> list[str]:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return _TOKEN.findall(text.translate(_SYMBOLS))


def _read_whole(text: str) -> Fact | None:
    tokens = _tokens(text)
    read = _read_statement(tokens, 0)
    return read[0] if read is not None and read[2] == len(tokens) else None


def _read_statement(tokens: list[str], start: int) -> tuple[Fact, int, int] | None:
    """The statement that begins at `start`, where to go on reading, and where it ends; None if none does."""
    left = _read_subject(tokens, start)
    if left is None:
        return None
    sort, name, at = left
    join, at = _read_join(tokens, at)
    if join is None:
        return None
    if join in ("yes", "no"):
        return _read_incidence(tokens, name, join, at) if sort == "points" else None
    right = _read_subject(tokens, at)
    if right is not None and right[0] == sort and sort != "points" and right[1] != name:
        kind = sort if join in ("equal", "unequal") else "lines"
        if kind == "lines" and sort != "lengths":
            return None
        fact = Fact(f"{kind} {', '.join(sorted((name, right[1])))}", join)
        return fact, at, right[2]  # in "AB = CD = 5" the second subject begins a statement of its own
    if join != "equal" or sort == "points":
        return None
    value, end = read_expression(tokens, at)
    return None if value is None else (Fact(name, value), end, end)


def _read_incidence(tokens: list[str], point: str, join: str, at: int) -> tuple[Fact, int, int] | None:
    at += tokens[at : at + 1] == ["the"]
    if tokens[at : at + 1] == ["circle"]:
        centre = _points(tokens[at + 1]) if at + 1 < len(tokens) else []
        return (Fact(f"{point} on circle {centre[0]}", join), at + 2, at + 2) if len(centre) == 1 else None
    line = _read_subject(tokens, at)
    if line is None or line[0] != "lengths":
        return None
    return Fact(f"{point} on line {line[1]}", join), line[2], line[2]


def _read_join(tokens: list[str], at: int) -> tuple[str | None, int]:
    for length in range(_LONGEST_JOIN, 0, -1):
        join = _JOINS.get(tuple(tokens[at : at + length]))
        if join is not None:
            return join, at + length
    return None, at


def _read_subject(tokens: list[str], at: int) -> tuple[str, str, int] | None:
    """Sort ("lengths", "angles", "arcs", "points"), canonical name and end of the subject at `at`."""
    word = tokens[at].lower() if at < len(tokens) else ""
    named = word in (r"\angle", "angle", "arc") or word in _NOUNS
    at += named
    if at >= len(tokens):
        return None
    name = tokens[at]
    points = _points(name)
    if word in (r"\angle", "angle"):
        if name.isascii() and name.isdigit() and len(name) <= 3:
            return "angles", f"angle {int(name)}", at + 1
        return ("angles", f"angle {_ordered(points)}", at + 1) if len(points) in (1, 3) else None
    if word == "arc":
        return ("arcs", f"arc {_ordered(points)}", at + 1) if len(points) >= 2 else None
    if len(points) == 1 and not named:
        return "points", name, at + 1
    return ("lengths", _ordered(points), at + 1) if len(points) == 2 else None


def _points(word: str) -> list[str]:
    """The different points that a word names, [] if it is no name."""
    points = re.findall(r"[A-Z]'?", word) if _POINTS.fullmatch(word) else []
    return points if len(set(points)) == len(points) else []


def _ordered(points: list[str]) -> str:
    """A name with its ends in order: a segment, angle or arc reads the same from both sides."""
    return "".join(points if points[0] <= points[-1] else points[::-1])
