"""Where the parts of a Geometry3K diagram go; y grows downwards, angles are degrees clockwise."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from foveate.rollout.rewards import Fact

Point = tuple[float, float]
Box = tuple[float, float, float, float]

SIDE, MARGIN = 448, 44  # pixels of the longer side, free border


def point_names(text: str) -> list[str]:
    """The points that a name such as `AB` or `AB'` is made of."""
    return re.findall(r"[A-Z]'?", text)


def known_points(points: Mapping[str, Sequence[float]]) -> dict[str, Point]:
    """The points whose place is known: [-1, -1] stands for one that is not marked in the diagram."""
    return {name: (float(x), float(y)) for name, (x, y) in points.items() if (x, y) != (-1, -1)}


def readable(expression: str) -> str:
    """An expression of the geometry grammar as a person writes it: `7√2`, `4/7`, `y²`."""
    expression = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", expression)
    expression = re.sub(r"\\sqrt\{([^{}]*)\}", r"√\1", expression)
    return re.sub(r"\^\{([^{}]*)\}", r"^\1", expression).replace("^2", "²").replace("^3", "³")


def labelled(fact: Fact) -> tuple[str, str]:
    """What gets a label, and the label: an angle's or arc's value has a degree sign, an angle's number has none."""
    number = re.fullmatch(r"angles angle (\d+), angle (\S+)", fact.subject)
    if number is not None and fact.value == "equal":
        return f"angle {number[2]}", number[1]
    text = readable(fact.value)
    if fact.subject.startswith(("angle ", "arc ")):
        text = f"{text}°" if text.replace(".", "").isalnum() else f"({text})°"
    return fact.subject, text


def circle_radii(known: Mapping[str, Point], circles: Iterable[str], facts: Iterable[Fact]) -> dict[str, float]:
    """Centre -> median distance of the points that the facts put on the circle; unknown circles are left out."""
    radii = {}
    for centre in circles:
        on_it = [
            f.subject.split(" ")[0] for f in facts if f.subject.endswith(f" on circle {centre}") and f.value == "yes"
        ]
        distances = sorted(math.dist(known[p], known[centre]) for p in on_it if p in known and centre in known)
        if distances and distances[len(distances) // 2] > 0:
            radii[centre] = distances[len(distances) // 2]
    return radii


def on_circles(known: Mapping[str, Point], radii: Mapping[str, float], facts: Iterable[Fact]) -> dict[str, Point]:
    """The points, each moved along its radius onto the circle that the facts put it on."""
    moved = dict(known)
    for fact in facts:
        name, _, centre = fact.subject.partition(" on circle ")
        if name in known and centre in radii and fact.value == "yes" and name not in radii:
            moved[name] = shift(known[centre], unit(known[centre], known[name]), radii[centre])
    return moved


def divided(pairs: Sequence[tuple[str, ...]], facts: Iterable[Fact]) -> list[tuple[str, ...]]:
    """The segments that are drawn by their parts, because a point with segments to both ends lies on them."""
    ends = {frozenset(pair) for pair in pairs}
    found = set()
    for fact in facts:
        name, _, line = fact.subject.partition(" on line ")
        names = point_names(line)
        if fact.value == "yes" and len(names) == 2 and all(frozenset((name, end)) in ends for end in names):
            found.add(frozenset(names))
    return [pair for pair in pairs if frozenset(pair) in found]


def fit(
    known: Mapping[str, Point], radii: Mapping[str, float]
) -> tuple[dict[str, Point], dict[str, float], tuple[int, int]]:
    """Points, radii and picture size in pixels, everything inside the margin and the aspect kept."""
    boxes = [(x, y, x, y) for x, y in known.values()]
    boxes += [(known[c][0] - r, known[c][1] - r, known[c][0] + r, known[c][1] + r) for c, r in radii.items()]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    width, height = max(b[2] for b in boxes) - left, max(b[3] for b in boxes) - top
    scale = (SIDE - 2 * MARGIN) / max(width, height, 1.0)
    size = (max(SIDE // 3, round(width * scale) + 2 * MARGIN), max(SIDE // 3, round(height * scale) + 2 * MARGIN))
    x0, y0 = (size[0] - width * scale) / 2 - left * scale, (size[1] - height * scale) / 2 - top * scale
    placed = {name: (x0 + x * scale, y0 + y * scale) for name, (x, y) in known.items()}
    return placed, {centre: radius * scale for centre, radius in radii.items()}, size


def unit(a: Point, b: Point) -> Point:
    """Direction from a to b, (1, 0) if they coincide."""
    length = math.dist(a, b)
    return ((b[0] - a[0]) / length, (b[1] - a[1]) / length) if length > 0 else (1.0, 0.0)


def shift(point: Point, direction: Point, distance: float) -> Point:
    return point[0] + direction[0] * distance, point[1] + direction[1] * distance


def between(a: Point, b: Point, share: float) -> Point:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share


def angle(a: Point, b: Point) -> float:
    """Direction from a to b in degrees."""
    return math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))


def sector(p: Point, vertex: Point, q: Point) -> tuple[float, float]:
    """Start and size in degrees of the angle p-vertex-q, the one of at most 180 degrees."""
    start, sweep = angle(vertex, p), (angle(vertex, q) - angle(vertex, p)) % 360
    return (start, sweep) if sweep <= 180 else (start + sweep, 360 - sweep)


def angle_spots(vertex: Point, start: float, sweep: float) -> list[Point]:
    """Places for the label of an angle: near its bisector, farther out where it is narrow."""
    least = min(70.0, max(27.0, 14 / math.sin(math.radians(max(sweep, 1)) / 2)))
    turns = [math.radians(start + sweep * share) for share in (0.5, 0.38, 0.62)]
    return [shift(vertex, (math.cos(t), math.sin(t)), least + 6 * step) for step in range(6) for t in turns]


def crossing(a: Point, b: Point, c: Point, d: Point) -> Point | None:
    """Where the lines ab and cd meet, None if they are (nearly) parallel."""
    u, v = unit(a, b), unit(c, d)
    det = u[0] * v[1] - u[1] * v[0]
    if abs(det) < 1e-3:
        return None
    along = ((c[0] - a[0]) * v[1] - (c[1] - a[1]) * v[0]) / det
    return shift(a, u, along)


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def inside(a: Point, b: Point, box: Box) -> float:
    """Length of the segment ab inside the box (Liang-Barsky clipping)."""
    first, last = 0.0, 1.0
    for start, step, low, high in ((a[0], b[0] - a[0], box[0], box[2]), (a[1], b[1] - a[1], box[1], box[3])):
        if step == 0:
            if not low <= start <= high:
                return 0.0
            continue
        enter, leave = sorted(((low - start) / step, (high - start) / step))
        first, last = max(first, enter), min(last, leave)
    return max(0.0, last - first) * math.dist(a, b)


def equal_classes(facts: Iterable[Fact], sort: str) -> list[list[str]]:
    """Classes of names that facts "<sort>X, Y" = "equal" join, in the order of their first fact."""
    classes: list[list[str]] = []
    for fact in facts:
        if fact.subject.startswith(sort) and fact.value == "equal":
            names = fact.subject.removeprefix(sort).split(", ")
            joined = [group for group in classes if set(group) & set(names)]
            merged = list(dict.fromkeys([name for group in joined for name in group] + names))
            classes = [group for group in classes if group not in joined] + [merged]
    return classes
