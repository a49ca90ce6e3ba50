"""The demo's report: what it says, that it is one file, and that no text of a model becomes markup."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from foveate.rollout.demo.charts import Axis, Series, format_value, line_chart, smooth, tick_step, ticks
from foveate.rollout.demo.gallery import highlight
from foveate.rollout.demo.record import Arm, DemoRecord, Reply
from foveate.rollout.demo.report import render, write_report
from foveate.rollout.demo.scenes import scene_stream
from foveate.rollout.demo.tasks import Evaluation

HOSTILE = "<script>alert(1)</script> \"><img src=x onerror='alert(2)'> <think> top-left <b>3</b> &amp; </think>"
PARTS = ("accuracy", "format", "perception", "repetition")
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


def reply(text, accuracy=1.0):
    return Reply(text, 1.7 * accuracy, dict(zip(PARTS, (accuracy, 1.0, None, 0.0), strict=True)))


def metrics(step):
    names = [f"reward/{part}" for part in PARTS] + ["policy/entropy", "policy/logprob_difference_max"]
    return {"step": float(step), "policy/logprob_difference_mean": 1e-7} | dict.fromkeys(names, 0.25 + step / 100)


def make_record(arms=1, text="<think> top-left 3 </think>"):
    scenes = list(itertools.islice(scene_stream("held-out", 0), 8))
    before = Evaluation((text,) * 8, (True, False, False, False) * 2, 0.4, 1.0)
    after = Evaluation((text,) * 8, (False, True, True, False) * 2, 0.6, 1.0)
    record = DemoRecord(3, 1_261_824, 2, 16, scenes, [0, 5], seconds=150.0)
    record.warm_start = [(20, 1.5, 0.1), (40, 0.5, 0.5)]
    record.before_samples = [[reply(text), reply(text, 0.0)] for _ in range(2)]
    for name in ("with the perception reward", "without the perception reward")[:arms]:
        samples = [[reply(text, 0.0), reply(text)] for _ in range(2)]
        record.arms.append(Arm(name, [metrics(step) for step in (1, 2, 3)], [(0, before), (3, after)], samples))
    return record


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a browser would load or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.handlers, self.seen = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.seen.append(data)


@pytest.mark.parametrize("arms", [1, 2])
def test_page_is_whole_and_loads_nothing(arms):
    text = render(make_record(arms))
    page = Page(text)
    assert not page.open
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert page.tags.count("svg") == 6
    assert page.tags.count("img") == 8 + 2


def test_text_of_a_model_never_becomes_markup():
    page = Page(render(make_record(text=HOSTILE)))
    assert not page.open
    assert "script" not in page.tags
    assert not page.handlers
    assert page.tags.count("img") == 8 + 2
    assert "b" not in page.tags[page.tags.index("table") : page.tags.index("table") + 40]
    assert any("<script>alert(1)</script>" in data for data in page.seen)


def test_page_states_the_result():
    record = make_record()
    seen = " ".join(Page(render(record)).seen)
    assert "held-out accuracy: 25.0% -> 50.0% (McNemar p = 0.69)" in seen  # 4 gained, 2 lost: 2 (1 + 6 + 15) / 2^6
    assert record.arms[0].result == "held-out accuracy: 25.0% -> 50.0% (McNemar p = 0.69)"
    assert "+25.0" in seen
    assert "4 gained, 2 lost" in seen
    assert "96" in seen  # 3 steps of 16 prompts x 2
    assert "1 of 2 right" in seen


def test_mosaic_sorts_scenes_by_outcome():
    text = render(make_record())
    sections = {
        name: text.split(f'class="outcome {name}"')[1].split("</section>")[0].count("<img")
        for name in ("gained", "lost", "kept", "missed")
    }
    assert sections == {"gained": 4, "lost": 2, "kept": 0, "missed": 2}


def test_highlight_marks_statements_and_answers():
    scene = next(scene for scene in scene_stream("held-out", 0) if len(scene.digits) == 2)
    (place, digit), (second, other) = scene.digits
    text = f"<think> {place} {digit} , {second} {(other + 1) % 10} </think> <answer> \\boxed{{ 4 }} </answer>"
    marked = highlight(scene, reply(text, 0.0))
    assert f'<span class="true">{place} {digit}</span>' in marked
    assert f'<span class="false">{second} {(other + 1) % 10}</span>' in marked
    assert '<span class="false">4</span>' in marked
    assert '<span class="true">4</span>' in highlight(scene, reply(text))
    assert highlight(scene, reply("")) == '<span class="tag">(empty)</span>'


def test_statements_outside_the_think_part_are_not_marked():
    scene = next(scene_stream("held-out", 0))
    place, digit = scene.digits[0]
    assert "<span" not in highlight(scene, reply(f"{place} {digit}"))


def test_report_replaces_an_older_one(tmp_path):
    folder = tmp_path / "a" / "b"
    path = write_report(make_record(), folder)
    path.write_text("old")
    assert write_report(make_record(), folder) == path == folder / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in folder.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("low", "high", "step", "expected"),
    [
        (0, 1, 0.2, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 400, 100, [0, 100, 200, 300, 400]),
        (0.43, 0.71, 0.1, [0.5, 0.6, 0.7]),
        (-3, 2, 1, [-3, -2, -1, 0, 1, 2]),
        (0, 11, 2.5, [0, 2.5, 5, 7.5, 10]),
        (2, 2, 0.5, [2]),
    ],
)
def test_ticks_are_round_and_inside(low, high, step, expected):
    assert tick_step(low, high) == pytest.approx(step)
    assert ticks(low, high, step) == pytest.approx(expected)


def test_the_frame_ends_on_ticks():
    drawing = line_chart("x", [Series("a", "red", [(0, 0.457), (1, 0.707)])], Axis("y", "percent"))
    assert re.findall(r">([\d.]+%)<", drawing) == ["45%", "50%", "55%", "60%", "65%", "70%", "75%"]


def test_smooth_is_the_mean_of_the_last_values():
    points = [(1, 4.0), (2, 8.0), (3, 0.0), (4, 1.0)]
    assert smooth(points, 2) == [(1, 4.0), (2, 6.0), (3, 4.0), (4, 0.5)]
    assert smooth(points, 1) == points
    assert smooth([], 3) == []


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.5, "percent", "50%"),
        (0.125, "percent", "12.5%"),
        (0.001, "log", "10⁻³"),
        (2e-6, "log", "2.0×10⁻⁶"),
        (3, "", "3"),
    ],
)
def test_values_as_an_axis_writes_them(value, kind, text):
    assert format_value(value, kind) == text


@pytest.mark.parametrize("kind", ["number", "percent", "log"])
@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [0.1, math.nan, 0.9], [0.0, 1e-9, 3.0]])
def test_any_values_can_be_drawn_inside_the_frame(kind, values):
    series = [Series("a & b", "red", list(enumerate(values)), dots=True)]
    drawing = line_chart("x < y", series, Axis("z", kind))
    page = Page(drawing)
    assert not page.open
    assert "nan" not in drawing
    drawable = [v for v in values if math.isfinite(v) and (kind != "log" or v > 0)]
    assert page.tags.count("circle") == (len(drawable))
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawing):
        assert 62 <= float(x) <= 544
        assert 14 <= float(y) <= 254


def test_rollouts_of_replaced_groups_are_counted():
    record = make_record()
    assert "96</div>" in render(record), "3 steps of 16 prompts x 2"
    for drawn, metrics in zip((16, 20, 40), record.arms[0].metrics, strict=True):
        metrics["group/drawn"] = float(drawn)
    assert "152</div>" in render(record)
    assert "3 steps, 76 prompts × 2" in render(record)
    assert "own recipe" not in render(record)
