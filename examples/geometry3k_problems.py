"""Reads Geometry3K problems and says their logic forms in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from geometry3k_diagram import draw_diagram
from geometry3k_layout import Point, between, known_points, point_names
from PIL import Image

from foveate.rollout.rewards import Fact, diagram_fact

INSTRUCTION = (
    "First say inside <think> </think> what the diagram shows, one statement a line, for example AB = 5. "
    r"Then answer as <answer>\boxed{...}</answer>."
)


@dataclass(frozen=True, eq=False)
class Problem:
    """One problem. facts: what its diagram shows; unread: logic forms that the grammar has no statement for.

    points: name -> (x, y) in pixels of the diagram, of those whose place is known.
    """

    id: int
    question: str
    diagram: Image.Image
    facts: tuple[Fact, ...]
    unread: tuple[str, ...]
    answer: str | None
    points: dict[str, Point]


def load_problems(path: Path, limit: int | None = None) -> list[Problem]:
    """Problems of a `problems.jsonl`, diagrams drawn from their annotations, or of a folder of JSON + PNG pairs.

    Problems with a known answer come first. Those without a readable fact or without a place for any point are
    left out: nothing can be seen in them. A `problems.jsonl` in the folder gives the places of its problems' points.
    Raises ValueError when no problem is left.
    """
    if path.is_dir():
        marks = path / "problems.jsonl"
        marked = {record["id"]: record for record in _lines(marks)} if marks.exists() else {}
        records = [{**json.loads(file.read_text()), "image": file.with_suffix(".png")} for file in _numbered(path)]
        records = [{"points": {}, "lines": []} | marked.get(record["id"], {}) | record for record in records]
    else:
        records = _lines(path)
    records = [record for record in records if _can_be_seen(record)]
    records.sort(key=lambda record: (record["answer"] is None, record["id"]))
    if not records:
        raise ValueError(f"expected problems with diagram facts, got none in {path} (PATH)")
    return [_problem(record) for record in records[:limit]]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _numbered(folder: Path) -> list[Path]:
    return sorted((file for file in folder.glob("*.json") if file.with_suffix(".png").exists()), key=lambda f: f.name)


def _can_be_seen(record: dict[str, Any]) -> bool:
    drawn = "image" in record or any((x, y) != (-1, -1) for x, y in record["points"].values())
    return drawn and any(diagram_fact(form) for form in record["diagram_facts"])


def _problem(record: dict[str, Any]) -> Problem:
    forms = [form for form in record["diagram_facts"] if form]
    read = {form: diagram_fact(form) for form in forms}
    facts = tuple(dict.fromkeys(fact for fact in read.values() if fact is not None))
    if "image" in record:
        diagram = Image.open(record["image"]).convert("RGB")
        points = points_in(diagram, record["points"], record["lines"])
        question, answer = record["problem_text"], record["choices"][ord(record["answer"]) - ord("A")]
    else:
        diagram, points = draw_diagram(record["points"], record["lines"], record["circles"], facts)
        question = ask(record["text_facts"], record["goal"])
        answer = None if record["answer"] is None else f"{record['answer']}".removesuffix(".0")
    return Problem(record["id"], question, diagram, facts, tuple(f for f in forms if read[f] is None), answer, points)


def points_in(diagram: Image.Image, points: Mapping[str, Sequence[float]], lines: Iterable[str]) -> dict[str, Point]:
    """The points in pixels of the original diagram.

    Their annotations are pixels too, counted from a corner of the drawing that is not told: the one that lays the
    annotated lines on the darkest pixels. Raises ValueError where the points do not fit into the diagram.
    """
    known = known_points(points)
    if not known:
        return {}
    ends = [names for names in map(point_names, lines) if len(names) == 2 and all(name in known for name in names)]
    spots = {*known.values(), *(between(known[a], known[b], k / 64) for a, b in ends for k in range(65))}
    dark = 255 - np.asarray(diagram.convert("L"), dtype=np.int64)
    rows, columns = (dark.shape[1 - axis] - math.ceil(max(spot[axis] for spot in spots)) for axis in (1, 0))
    if min(rows, columns) < 1:
        raise ValueError(f"expected points inside {diagram.size}, got {dict(points)!r} (points)")
    found = sum(dark[round(y) : round(y) + rows, round(x) : round(x) + columns] for x, y in spots)
    top, left = np.unravel_index(np.argmax(found), (rows, columns))
    return {name: (x + float(left), y + float(top)) for name, (x, y) in known.items()}


def ask(text_facts: list[str], goal: str | None) -> str:
    """The question that the logic forms stand for: "In circle X, AB = 30. Find arc AB." in plain words."""
    given = ", ".join(in_words(form) for form in text_facts if form)
    wanted = in_words(goal) if goal else "Find the unknown value"
    return f"Given {given}. {wanted}." if given else f"{wanted}."


_JOINED = {"Equals": "=", "Congruent": "is congruent to", "Similar": "is similar to", "Parallel": "is parallel to",
           "Perpendicular": "is perpendicular to", "Tangent": "is tangent to", "InscribedIn": "is inscribed in",
           "CircumscribedTo": "is circumscribed to", "PointLiesOnLine": "lies on", "PointLiesOnCircle": "lies on",
           "BisectsAngle": "bisects", "IntersectAt": "meets at"}  # fmt: skip
_SILENT = ("LengthOf", "MeasureOf", "Line", "Shape")
_NAME = re.compile(r"[A-Z]'?")


def in_words(form: str) -> str:
    """A logic form in words, for example `Find(MeasureOf(Arc(A,B)))` as "Find arc AB"."""
    words, end = _words(form, 0)
    return words if end == len(form) else form


def _words(form: str, at: int) -> tuple[str, int]:
    """The words of the form that begins at `at`, and where it ends."""
    head = re.compile(r"[^(),]*").match(form, at)
    assert head is not None
    name, at = head[0].strip(), head.end()
    if form[at : at + 1] != "(":
        return name, at
    parts: list[str] = []
    while form[at : at + 1] in ("(", ","):
        part, at = _words(form, at + 1)
        parts.append(part)
    return _phrase(name, [part for part in parts if not part.startswith("$")]), at + 1


def _phrase(name: str, parts: list[str]) -> str:
    plain = " ".join(re.findall(r"[A-Z][a-z]*", name)).lower()
    if name == "Find":
        return f"Find {' '.join(parts)}"
    if name in _JOINED:
        return f" {_JOINED[name]} ".join(parts)
    if name.startswith("Is") and name.endswith("Of") and len(parts) == 2:
        return f"{parts[0]} is the {plain[3:-3]} of {parts[1]}"
    named = "".join(parts) if all(_NAME.fullmatch(part) for part in parts) else ", ".join(parts)
    if name in _SILENT:
        return named or f"the {plain}"
    if name.endswith("Of"):
        return f"the {plain} {named}".rstrip()
    if named.startswith("the "):
        return f"the {plain} {named[4:]}"  # an adjective: "the shaded sector"
    return f"{plain} {named}" if named else f"the {plain}"
