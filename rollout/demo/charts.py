"""Line charts and dumbbell charts as inline SVG, coloured by the page's CSS variables."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46


@dataclass(frozen=True)
class Series:
    """A line. colour: a CSS colour. points: (x, y) by rising x; a point that is not finite is left out.

    raw: the same before smoothing, drawn faintly behind. dots: mark each point and say its value on hover.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    raw: Sequence[tuple[float, float]] = ()
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """The vertical axis. kind: "percent" of values in [0, 1], "number", or "log" for positive values."""

    label: str
    kind: str = "number"
    low: float | None = None
    high: float | None = None


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of the last `window` values at each point (of fewer at the beginning)."""
    values = [y for _, y in points]
    return [(x, sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)) for i, (x, _) in enumerate(points)]


def tick_step(low: float, high: float, count: int = 5) -> float:
    """The smallest 1, 2, 2.5 or 5 times a power of ten that cuts [low, high] into at most `count` pieces."""
    rough = (high - low) / count if high > low else max(abs(low), 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of step inside [low, high]."""
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def format_value(value: float, kind: str) -> str:
    """A value as its axis writes it."""
    if kind == "percent":
        return f"{value * 100:.4g}%"
    if kind == "log":
        exponent = math.floor(math.log10(value))
        mantissa = value / 10.0**exponent
        text = f"10{str(exponent).translate(SUPERSCRIPTS)}"
        return text if abs(mantissa - 1) < 0.05 else f"{mantissa:.1f}×{text}"
    return f"{value:.4g}"


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class _Frame:
    """Where values stand in the drawing."""

    def __init__(self, series: Sequence[Series], axis: Axis):
        points = [p for s in series for p in (*s.points, *s.raw) if _drawable(p, axis)]
        self.axis = axis
        xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [1.0]
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1)
        if axis.kind == "log":
            self.low: float = math.floor(math.log10(min(ys)))
            self.high: float = math.ceil(math.log10(max(ys)) + 1e-9)
            self.high = max(self.high, self.low + 1)
            return
        low = min(ys) if axis.low is None else axis.low
        high = max(ys) if axis.high is None else axis.high
        self.step = tick_step(low, high)
        self.low = math.floor(low / self.step + 1e-9) * self.step if axis.low is None else axis.low
        self.high = math.ceil(high / self.step - 1e-9) * self.step if axis.high is None else axis.high
        self.high = max(self.high, self.low + self.step)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.axis.kind == "log" else value
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[float]:
        if self.axis.kind == "log":
            return [10.0**i for i in range(round(self.low), round(self.high) + 1)]
        return ticks(self.low, self.high, self.step)


def _drawable(point: tuple[float, float], axis: Axis) -> bool:
    return math.isfinite(point[1]) and (axis.kind != "log" or point[1] > 0)


def line_chart(label: str, series: Sequence[Series], axis: Axis, x_label: str = "GRPO step") -> str:
    """SVG of the series with grid, ticks and axis labels. label: what a screen reader says."""
    frame = _Frame(series, axis)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for value in frame.y_ticks():
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, format_value(value, axis.kind), "end"))
    for value in ticks(frame.x_low, frame.x_high, tick_step(frame.x_low, frame.x_high, 6)):
        parts.append(_text(frame.x(value), HEIGHT - BOTTOM + 18, f"{value:g}", "middle"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "axis"))
    turn = f'transform="rotate(-90 14 {middle:.0f})"'
    parts.append(_text(14, middle, axis.label, "middle", "axis", turn))
    for one in series:
        parts += _line(one, frame)
    return "".join([*parts, "</svg>"])


def _line(series: Series, frame: _Frame) -> list[str]:
    parts = []
    for points, style in ((series.raw, "raw"), (series.points, "dashed" if series.dashed else "line")):
        drawable = [p for p in points if _drawable(p, frame.axis)]
        if drawable:
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in drawable)
            parts.append(f'<polyline class="{style}" style="stroke:{series.colour}" points="{path}"/>')
    for x, y in (p for p in series.points if series.dots and _drawable(p, frame.axis)):
        title = f"{series.name}, step {x:g}: {format_value(y, frame.axis.kind)}"
        spot = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" style="fill:{series.colour}"'
        parts.append(f'<circle class="dot" {spot}><title>{html.escape(title)}</title></circle>')
    return parts


def dumbbell_chart(label: str, rows: Sequence[tuple[str, float, Sequence[tuple[str, float]]]]) -> str:
    """SVG of one row a name: (name, value before, [(colour, value after), ...]), values in [0, 1]."""
    left, gap, top = 158, 46, 22
    height = top + gap * len(rows) + 34
    scale = WIDTH - left - 40
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">']
    for value in (0, 0.25, 0.5, 0.75, 1):
        x = left + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 34}"/>')
        parts.append(_text(x, height - 14, f"{value:.0%}", "middle"))
    for index, (name, before, after) in enumerate(rows):
        y = top + gap * index + gap / 2 - 6
        parts.append(_text(left - 14, y + 4, name, "end", "row"))
        for place, (colour, value) in enumerate(after):
            level = y + 9 * place - 4.5 * (len(after) - 1)
            x1, x2 = left + before * scale, left + value * scale
            ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{level:.1f}" y2="{level:.1f}"'
            parts.append(f'<line class="bar" style="stroke:{colour}" {ends}/>')
            parts.append(f'<circle class="hollow" cx="{x1:.1f}" cy="{level:.1f}" r="4.5"/>')
            title = f"<title>{html.escape(name)}: {before:.1%} before, {value:.1%} after</title>"
            spot = f'cx="{x2:.1f}" cy="{level:.1f}" r="5.5"'
            parts.append(f'<circle class="dot" style="fill:{colour}" {spot}>{title}</circle>')
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick", extra: str = "") -> str:
    attributes = f'class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}'.strip()
    return f"<text {attributes}>{html.escape(text)}</text>"
