"""Draws a Geometry3K diagram from its annotations: points, lines, circles and what the facts say about them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from geometry3k_layout import (
    Box,
    Point,
    angle,
    angle_spots,
    between,
    circle_radii,
    crossing,
    divided,
    equal_classes,
    fit,
    inside,
    known_points,
    labelled,
    on_circles,
    overlap,
    point_names,
    sector,
    shift,
    unit,
)
from PIL import Image, ImageDraw, ImageFont

from foveate.rollout.rewards import Fact

SCALE = 3  # supersampling
INK, BLUE, GREEN, GREY = (25, 25, 30), (20, 70, 160), (10, 110, 60), (150, 150, 155)
NAME_SIZE, LABEL_SIZE = 17, 15


def draw_diagram(
    points: Mapping[str, Sequence[float]], lines: Iterable[str], circles: Iterable[str], facts: Iterable[Fact]
) -> tuple[Image.Image, dict[str, Point]]:
    """An RGB picture of the diagram, 448 pixels on its longer side, and where its points are in it, in pixels.

    points: name -> (x, y), y downwards, any unit; [-1, -1] marks a point whose place is unknown: it is left out
    with all that needs it. lines: pairs of names. circles: centres; a radius follows from the facts that put
    points on the circle. Raises ValueError when no point has a place.
    """
    known = known_points(points)
    if not known:
        raise ValueError(f"expected a point with a place, got {dict(points)!r} (points)")
    facts = list(dict.fromkeys(facts))
    radii = circle_radii(known, circles, facts)
    known = on_circles(known, radii, facts)
    placed, radii, size = fit(known, radii)
    pairs = [tuple(point_names(line)) for line in lines]
    pairs = [pair for pair in pairs if len(pair) == 2 and all(name in placed for name in pair)]
    whole = divided(pairs, facts)
    sheet = Sheet(size, placed, [pair for pair in pairs if pair not in whole], whole, radii)
    sheet.draw_outlines()
    for fact in facts:
        sheet.draw_right_angle(fact)
    sheet.draw_equal_marks(facts)
    sheet.draw_angle_arcs(facts)
    for name in placed:
        sheet.label_point(name)
    # Angles have the least room, so they choose their place first.
    for fact in sorted(facts, key=lambda f: not f.subject.startswith("angle")):
        sheet.label_value(fact)
    return sheet.finish(), placed


@functools.cache
def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, so that pictures are the same on every machine."""
    return ImageFont.load_default(size)


def text_size(text: str, size: int) -> tuple[float, float]:
    left, top, right, bottom = font(size * 4).getbbox(text)
    return (right - left) / 4, (bottom - top) / 4


@dataclass
class Sheet:
    """A picture being drawn. All coordinates are pixels of the finished picture."""

    size: tuple[int, int]
    points: dict[str, Point]
    segments: list[tuple[str, ...]]  # drawn
    whole: list[tuple[str, ...]]  # drawn by their parts
    radii: dict[str, float]
    boxes: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.size[0] * SCALE, self.size[1] * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)
        middle = [sum(p[i] for p in self.points.values()) / len(self.points) for i in (0, 1)]
        self.middle = (middle[0], middle[1])

    def finish(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def line(self, a: Point, b: Point, color=INK, width: float = 1.7) -> None:
        self.pen.line([SCALE * v for v in (*a, *b)], fill=color, width=round(width * SCALE))

    def arc(self, centre: Point, radius: float, start: float, end: float, color=BLUE) -> None:
        box = [SCALE * v for v in (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)]
        self.pen.arc(box, start, end, fill=color, width=round(1.2 * SCALE))

    def draw_outlines(self) -> None:
        for centre, radius in self.radii.items():
            (x, y), r = self.points[centre], radius
            self.pen.ellipse([SCALE * v for v in (x - r, y - r, x + r, y + r)], outline=INK, width=round(1.7 * SCALE))
        for a, b in self.segments:
            self.line(self.points[a], self.points[b])
        for x, y in self.points.values():
            self.pen.ellipse([SCALE * v for v in (x - 2.6, y - 2.6, x + 2.6, y + 2.6)], fill=INK)

    # --- marks ---------------------------------------------------------------------------------------------

    def draw_right_angle(self, fact: Fact) -> None:
        """A small square where two perpendicular lines meet, chevrons on parallel ones."""
        if not fact.subject.startswith("lines ") or fact.value not in ("perpendicular", "parallel"):
            return
        first, second = (point_names(name) for name in fact.subject.removeprefix("lines ").split(", "))
        if any(name not in self.points for name in (*first, *second)):
            return
        a, b, c, d = (self.points[name] for name in (*first, *second))
        if fact.value == "parallel":
            direction = unit(a, b)
            self._chevron(a, b, direction)
            self._chevron(c, d, direction)
            return
        corner = crossing(a, b, c, d)
        if corner is None or not (0 <= corner[0] <= self.size[0] and 0 <= corner[1] <= self.size[1]):
            return
        u, v = (unit(corner, max(pair, key=lambda p: math.dist(p, corner))) for pair in ((a, b), (c, d)))
        near, far, other = shift(corner, u, 10), shift(shift(corner, u, 10), v, 10), shift(corner, v, 10)
        self.line(near, far, GREEN, 1.2)
        self.line(far, other, GREEN, 1.2)
        self._keep_free(between(corner, far, 0.5), 6)

    def _chevron(self, a: Point, b: Point, direction: Point) -> None:
        tip = between(a, b, 0.42)
        for side in (-1, 1):
            back = (-direction[0] - side * direction[1], -direction[1] + side * direction[0])
            self.line(tip, shift(tip, back, 6), GREEN, 1.4)
        self._keep_free(tip, 6)

    def draw_equal_marks(self, facts: Iterable[Fact]) -> None:
        """Ticks on segments of equal length and arcs in equal angles: one in the first class, two in the next."""
        for count, names in enumerate(equal_classes(facts, "lengths "), 1):
            for name in names:
                self._ticks(point_names(name), min(count, 4))
        unnumbered = [c for c in equal_classes(facts, "angles ") if not any(name[-1].isdigit() for name in c)]
        for count, names in enumerate(unnumbered, 1):
            for name in names:
                for k in range(min(count, 4)):
                    self._angle_arc(point_names(name.removeprefix("angle ")), 15 + 3 * k)

    def _ticks(self, ends: list[str], count: int) -> None:
        if any(name not in self.points for name in ends):
            return
        a, b = (self.points[name] for name in ends)
        along = unit(a, b)
        normal = (-along[1], along[0])
        for k in range(count):
            at = shift(between(a, b, 0.5), along, 4 * (k - (count - 1) / 2))
            self.line(shift(at, normal, -6), shift(at, normal, 6), GREEN, 1.4)
        self._keep_free(between(a, b, 0.5), 6)

    def draw_angle_arcs(self, facts: Iterable[Fact]) -> None:
        """An arc in every angle that gets a label."""
        for fact in facts:
            subject, _ = labelled(fact)
            if subject.startswith("angle "):
                self._angle_arc(point_names(subject.removeprefix("angle ")), 15)

    def _keep_free(self, at: Point, half: float) -> None:
        self.boxes.append((at[0] - half, at[1] - half, at[0] + half, at[1] + half))

    def _angle_arc(self, names: list[str], radius: float) -> None:
        if len(names) == 3 and all(name in self.points for name in names):
            p, vertex, q = (self.points[name] for name in names)
            start, sweep = sector(p, vertex, q)
            self.arc(vertex, radius, start, start + sweep)
            middle = math.radians(start + sweep / 2)
            self._keep_free(shift(vertex, (math.cos(middle), math.sin(middle)), 11), 6)

    # --- labels --------------------------------------------------------------------------------------------

    def label_point(self, name: str) -> None:
        """The name beside its point, in the direction with the fewest lines."""
        at = self.points[name]
        ends = [self.points[b if a == name else a] for a, b in self.segments if name in (a, b)]
        pull = [unit(at, end) for end in ends] or [unit(at, self.middle)]
        away = math.atan2(-sum(p[1] for p in pull), -sum(p[0] for p in pull))
        turns = sorted((2 * math.pi * k / 16 for k in range(-8, 8)), key=abs)
        spots = [shift(at, (math.cos(away + t), math.sin(away + t)), r) for r in (15, 20) for t in turns]
        self._write(name, spots, NAME_SIZE, INK)

    def label_value(self, fact: Fact) -> None:
        """The value of a length, angle or arc, or the number of an angle, where the diagram has it."""
        subject, text = labelled(fact)
        names = point_names(subject.split(" ")[-1])
        if subject.startswith(("angles", "lengths", "arcs", "lines")) or any(n not in self.points for n in names):
            return
        if subject.startswith("angle ") and len(names) == 3:
            p, vertex, q = (self.points[name] for name in names)
            self._write(text, angle_spots(vertex, *sector(p, vertex, q)), LABEL_SIZE, BLUE)
        elif subject.startswith("arc "):
            self._label_arc(names, text)
        elif " " not in subject and len(names) == 2:
            self._label_length(names, text)

    def _label_arc(self, names: list[str], text: str) -> None:
        ends = [self.points[name] for name in names]
        fits = {
            centre: max(abs(math.dist(end, self.points[centre]) - radius) for end in ends)
            for centre, radius in self.radii.items()
        }
        if not fits:
            return
        centre = min(fits, key=lambda name: fits[name])
        middle, radius = self.points[centre], self.radii[centre]
        start, sweep = sector(ends[0], middle, ends[-1])
        if len(ends) == 3 and (angle(middle, ends[1]) - start) % 360 > sweep:
            start, sweep = start + sweep, 360 - sweep  # the arc runs through the point between its ends
        turns = [math.radians(start + sweep * t) for t in (0.5, 0.4, 0.6, 0.3, 0.7)]
        spots = [shift(middle, (math.cos(t), math.sin(t)), radius + d) for d in (18, 24, -18) for t in turns]
        self._write(text, spots, LABEL_SIZE, BLUE)

    def _label_length(self, names: list[str], text: str) -> None:
        a, b = (self.points[name] for name in names)
        along = unit(a, b)
        normal = (-along[1], along[0])
        middle = between(a, b, 0.5)
        if (middle[0] - self.middle[0]) * normal[0] + (middle[1] - self.middle[1]) * normal[1] < 0:
            normal = (-normal[0], -normal[1])  # outwards
        width, height = text_size(text, LABEL_SIZE)
        clear = (abs(normal[0]) * width + abs(normal[1]) * height) / 2 + 5
        if {*names} in [{*pair} for pair in self.whole]:
            # The parts have labels of their own: the whole gets a dimension line farther out.
            a, b = shift(a, normal, 26), shift(b, normal, 26)
            self.line(a, b, GREY, 1)
            for end in (a, b):
                self.line(shift(end, normal, -4), shift(end, normal, 4), GREY, 1)
            spots = [between(a, b, t) for t in (0.5, 0.4, 0.6, 0.3, 0.7)]
            self._write(text, spots, LABEL_SIZE, BLUE, halo=3.0)
            return
        shares = (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74)
        sides = [(side * clear * spread, t) for spread in (1, 1.4) for side in (1, -1) for t in shares]
        self._write(text, [shift(between(a, b, t), normal, far) for far, t in sides], LABEL_SIZE, BLUE)

    def _write(self, text: str, spots: list[Point], size: int, color: tuple[int, int, int], halo: float = 0.7) -> None:
        """Writes text at the spot where it hides least; earlier spots are liked better."""
        width, height = text_size(text, size)
        boxes = [(x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y in spots]
        costs = [self._cost(box) + 0.25 * rank for rank, box in enumerate(boxes)]
        box = boxes[costs.index(min(costs))]
        self.boxes.append(box)
        where = (SCALE * (box[0] + box[2]) / 2, SCALE * (box[1] + box[3]) / 2)
        self.pen.text(
            where,
            text,
            font=font(size * SCALE),
            fill=color,
            anchor="mm",
            stroke_width=round(halo * SCALE),
            stroke_fill="white",
        )

    def _cost(self, box: Box) -> float:
        """How much of the drawing a label in this box would hide or leave."""
        grown = (box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2)
        cost = sum(overlap(grown, other) for other in self.boxes)
        area = (grown[2] - grown[0]) * (grown[3] - grown[1])
        cost += 40 * (area - overlap(grown, (0, 0, *self.size)))
        cost += sum(2 * inside(self.points[a], self.points[b], grown) for a, b in self.segments)
        cost += sum(30 for p in self.points.values() if overlap(grown, (p[0] - 3, p[1] - 3, p[0] + 3, p[1] + 3)))
        for centre, radius in self.radii.items():
            corners = [math.dist(self.points[centre], (x, y)) for x in grown[::2] for y in grown[1::2]]
            cost += 25 * (min(corners) < radius < max(corners))
        return cost
