"""The Geometry3K example: real problems are read, drawn, asked and scored."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.rollout.rewards import Fact, GeometryGrammar, RuleJudge
from foveate.rollout.types import Rollout, RolloutGroup

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "geometry3k"
sys.path.append(str(ROOT / "examples"))  # the example's files import each other, as they do when it is run

import geometry3k  # noqa: E402
import geometry3k_diagram as diagram  # noqa: E402
import geometry3k_layout as layout  # noqa: E402
import geometry3k_problems as problems  # noqa: E402
import geometry3k_pruning as pruning  # noqa: E402

JUDGE = RuleJudge([GeometryGrammar()])


@pytest.fixture(scope="module")
def drawn():
    return problems.load_problems(DATA / "problems.jsonl")


def test_a_folder_of_problems_is_read_with_its_own_diagrams():
    found = problems.load_problems(DATA)
    assert [problem.id for problem in found] == list(range(11, 21))
    by_id = {problem.id: problem for problem in found}
    assert by_id[12].question == "Find x."
    assert [by_id[i].answer for i in (11, 12, 15)] == ["80", "13", r"5 \sqrt { 3 }"]
    assert by_id[15].facts == (
        Fact("AB", "10"),
        Fact("AC", "y"),
        Fact("angle ABC", "60"),
        Fact("BC", "x"),
        Fact("lines AC, BC", "perpendicular"),
    )
    assert by_id[15].diagram.mode == "RGB"
    assert not any(problem.unread for problem in found)
    assert len(problems.load_problems(DATA, limit=3)) == 3


def test_problems_without_pictures_are_drawn_answered_ones_first(drawn):
    assert [problem.id for problem in drawn] == [2401, 2402, *range(11, 21)]
    assert [problem.answer for problem in drawn[:3]] == ["60", "5", None]
    assert all(max(problem.diagram.size) == 448 for problem in drawn)
    again = problems.load_problems(DATA / "problems.jsonl", limit=1)[0]
    assert again.diagram.tobytes() == drawn[0].diagram.tobytes()


def test_nothing_to_see_is_an_error(tmp_path):
    unseen = '{"id": 1, "points": {"A": [-1, -1]}, "diagram_facts": ["Equals(LengthOf(Line(A, B)), 1)"]}\n'
    silent = '{"id": 2, "points": {"A": [5, 5]}, "diagram_facts": []}\n'
    (tmp_path / "problems.jsonl").write_text(unseen + silent)
    for path in (tmp_path, tmp_path / "problems.jsonl"):
        with pytest.raises(ValueError, match="got none"):
            problems.load_problems(path)
    with pytest.raises(ValueError, match="a point with a place"):
        diagram.draw_diagram({"A": (-1, -1)}, [], [], [])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("Find(x)", "Find x"),
        ("Find(MeasureOf(Arc(A,B)))", "Find arc AB"),
        ("Find(AreaOf(Shaded(Sector($))))", "Find the area of the shaded sector"),
        ("Find(PerimeterOf(Triangle(A,B,C)))", "Find the perimeter of triangle ABC"),
        ("Equals(LengthOf(Line(A,B)),30)", "AB = 30"),
        ("Congruent(Triangle(R,S,T),Triangle(X,Y,Z))", "triangle RST is congruent to triangle XYZ"),
        ("IsMidpointOf(Point(B),Line(A,C))", "point B is the midpoint of AC"),
        ("Parallelogram($)", "the parallelogram"),
        ("Circle(X)", "circle X"),
        ("not (closed", "not (closed"),
    ],
)
def test_logic_forms_in_words(form, words):
    assert problems.in_words(form) == words


def test_the_question_holds_what_is_given():
    assert problems.ask(["Circle(X)", ""], "Find(y)") == "Given circle X. Find y."
    assert problems.ask([], None) == "Find the unknown value."


def darkest(image, point):
    """The least brightness within two pixels."""
    x, y = (round(v) for v in point)
    return min(sum(image.getpixel((x + i, y + j))) for i in range(-2, 3) for j in range(-2, 3))


def test_lines_circles_and_points_lie_where_the_annotations_say():
    points = {"A": (0, 0), "B": (100, 0), "C": (100, 50), "O": (50, 25), "Z": (-1, -1)}
    facts = [Fact("A on circle O", "yes"), Fact("C on circle O", "yes")]
    picture, drawn = diagram.draw_diagram(points, ["AB", "BC", "CZ"], ["O", "Z"], facts)
    radius = math.dist((0, 0), (50, 25))
    assert layout.circle_radii({k: v for k, v in points.items() if k != "Z"}, ["O", "Z"], facts) == {"O": radius}
    scale = 360 / (2 * radius)
    place = {name: (224 + (x - 50) * scale, 224 + (y - 25) * scale) for name, (x, y) in points.items()}
    assert picture.size == (448, 448)
    assert drawn == {name: pytest.approx(place[name]) for name in "ABCO"}
    dark = [layout.between(place["A"], place["B"], 0.5), layout.between(place["B"], place["C"], 0.3), place["O"]]
    dark += [(224 + 180, 224), (224, 224 - 180), (224, 224 + 180)]
    assert all(darkest(picture, point) < 300 for point in dark)
    light = [(5, 5), (224, 300), layout.between(place["A"], place["C"], 0.25)]
    assert all(darkest(picture, point) > 700 for point in light)


def test_a_point_moves_onto_its_circle_and_a_divided_line_is_drawn_by_its_parts():
    known = {"O": (0.0, 0.0), "A": (10.0, 0.0), "B": (0.0, 10.0), "C": (3.0, 4.0)}
    facts = [Fact(f"{name} on circle O", "yes") for name in "ABC"]
    radii = layout.circle_radii(known, ["O"], facts)
    assert radii == {"O": 10.0}
    assert layout.on_circles(known, radii, facts)["C"] == pytest.approx((6.0, 8.0))
    pairs = [("A", "D"), ("A", "B"), ("B", "D"), ("C", "D")]
    assert layout.divided(pairs, [Fact("B on line AD", "yes"), Fact("A on line CD", "yes")]) == [("A", "D")]
    assert layout.divided(pairs, [Fact("B on line AD", "no")]) == []


def test_plane_geometry():
    assert layout.sector((1, 0), (0, 0), (0, 1)) == pytest.approx((0, 90))
    assert layout.sector((0, 1), (0, 0), (1, 0)) == pytest.approx((360, 90))
    assert layout.crossing((0, 0), (2, 2), (0, 2), (2, 0)) == pytest.approx((1, 1))
    assert layout.crossing((0, 0), (1, 0), (0, 1), (1, 1)) is None
    assert layout.overlap((0, 0, 2, 2), (1, 1, 3, 3)) == 1
    assert layout.overlap((0, 0, 1, 1), (2, 0, 3, 1)) == 0
    assert layout.inside((-1, 0.5), (3, 0.5), (0, 0, 1, 1)) == pytest.approx(1)
    assert layout.inside((0, 2), (3, 2), (0, 0, 1, 1)) == 0
    facts = [Fact("lengths AB, CD", "equal"), Fact("lengths EF, GH", "equal"), Fact("lengths CD, IJ", "equal")]
    assert layout.equal_classes(facts, "lengths ") == [["EF", "GH"], ["AB", "CD", "IJ"]]


@pytest.mark.parametrize(
    ("fact", "label"),
    [
        (Fact("AB", r"\frac{1}{2}x+5"), ("AB", "1/2x+5")),
        (Fact("AB", r"7\sqrt{2}"), ("AB", "7√2")),
        (Fact("AB", "y^{2}"), ("AB", "y²")),
        (Fact("angle ABC", "60.5"), ("angle ABC", "60.5°")),
        (Fact("angle ABC", "4y-10"), ("angle ABC", "(4y-10)°")),
        (Fact("angles angle 12, angle ABC", "equal"), ("angle ABC", "12")),
    ],
)
def test_labels(fact, label):
    assert layout.labelled(fact) == label


def test_labels_stay_inside_the_picture_and_apart(monkeypatch):
    sheets = []
    monkeypatch.setattr(diagram.Sheet, "finish", lambda sheet: sheets.append(sheet))
    problems.load_problems(DATA / "problems.jsonl")
    assert len(sheets) == 12
    for sheet in sheets:
        width, height = sheet.size
        assert sheet.boxes
        assert all(x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height for x0, y0, x1, y1 in sheet.boxes)
    hidden = sum(
        layout.overlap(a, b) > 12 for sheet in sheets for i, a in enumerate(sheet.boxes) for b in sheet.boxes[:i]
    )
    assert hidden <= 3  # only where angles or arcs of one vertex share their marks


def test_a_label_avoids_the_border_lines_and_other_labels():
    sheet = diagram.Sheet((100, 100), {"A": (10, 80), "B": (90, 80)}, [("A", "B")], [], {})
    for _ in range(2):
        sheet._write("label", [(5, 50), (50, 80), (50, 30), (50, 60)], 15, (0, 0, 0))
    assert [(box[1] + box[3]) / 2 for box in sheet.boxes] == [30, 60]


def group_with(problem, text):
    none = torch.zeros(0)
    rollout = Rollout(none.long(), none, none, none, "stop", text=text)
    request = geometry3k.make_request(problem, 1, 8)
    return RolloutGroup(request, "r", none.long(), none.int().expand(3, 0), 0, none.int(), (rollout,))


def test_stating_the_facts_scores_1_and_mixing_them_up_less(drawn):
    reward = geometry3k.geometry_reward()
    for problem in drawn:
        scores = reward(group_with(problem, geometry3k.reply_with(problem.facts, problem.answer)))
        assert scores.parts["perception"] == [1.0]
        assert scores.parts["format"] == [1.0]
        assert scores.totals == ([pytest.approx(1.7)] if problem.answer is not None else [None])
        values = [fact.value for fact in problem.facts]
        mixed = [Fact(f.subject, v) for f, v in zip(problem.facts, values[1:] + values[:1], strict=True)]
        if mixed != list(problem.facts):
            assert reward(group_with(problem, geometry3k.reply_with(mixed, "0"))).parts["perception"][0] < 1
        missing = geometry3k.reply_with(problem.facts[1:], problem.answer)
        expected = 1 - 1 / len(problem.facts)
        assert JUDGE(missing, problem.facts) == pytest.approx(expected)


def test_the_example_runs_with_a_random_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    page = tmp_path / "page.png"
    arguments = [str(DATA / "problems.jsonl"), "--limit", "2", "--n", "2", "--max-tokens", "4", "--out", str(page)]
    geometry3k.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert sum("length" in line or "stop" in line for line in lines) == 4
    assert sum(line.split()[:1] == ["facts"] and "1.70" in line for line in lines) == 2
    assert page.stat().st_size > 10_000


def test_points_lie_on_the_lines_of_the_original_diagrams():
    """Their annotations count from a corner that is not told; moved by 8 pixels, most would lie on white."""
    found = problems.load_problems(DATA)
    assert sum(len(problem.points) for problem in found) == 63
    moved = 0
    for problem in found:
        padded = Image.new("RGB", tuple(size + 60 for size in problem.diagram.size), "white")
        padded.paste(problem.diagram, (30, 30))
        points = [(x + 30, y + 30) for x, y in problem.points.values()]
        assert all(darkest(padded, point) < 3 * 120 for point in points)
        moved += sum(darkest(padded, (x + 8, y - 8)) < 3 * 120 for x, y in points)
    assert moved < 32


def test_points_that_do_not_fit_are_an_error():
    white = Image.new("RGB", (100, 50), "white")
    assert problems.points_in(white, {"A": [-1, -1]}, ["AB"]) == {}
    with pytest.raises(ValueError, match=r"points inside \(100, 50\)"):
        problems.points_in(white, {"A": [10, 10], "B": [20, 60]}, ["AB"])


def test_points_are_found_again_where_they_were_drawn(drawn):
    records = map(json.loads, (DATA / "problems.jsonl").read_text().splitlines())
    lines = {record["id"]: record["lines"] for record in records}
    for problem in drawn:
        left, top = (min(point[axis] for point in problem.points.values()) for axis in (0, 1))
        known = {name: (x - left, y - top) for name, (x, y) in problem.points.items()}
        found = problems.points_in(problem.diagram, known, lines[problem.id])
        assert all(math.dist(found[name], problem.points[name]) < 2 for name in known)


class Cells:
    """A problem with points at the middles of patches of 10 x 10 pixels."""

    def __init__(self, *cells):
        self.diagram = Image.new("RGB", (40, 20), "white")
        self.points = {str(k): (10 * column + 5.0, 10 * row + 5.0) for k, (row, column) in enumerate(cells)}
        for x, y in self.points.values():
            self.diagram.paste((0, 0, 0), (int(x) - 2, int(y) - 2, int(x) + 2, int(y) + 2))


def test_shares_count_points_and_patches_with_ink():
    masks = [np.array([[True, False, False, True], [False, True, False, False]]), np.ones((2, 4), bool)]
    first, second = Cells((0, 0), (0, 1), (1, 1), (1, 3)), Cells((1, 2))
    first.points["again"] = first.points["0"]  # two points on one patch count twice, its ink once
    assert pruning.point_cells(first, 2, 4) == [(0, 0), (0, 1), (1, 1), (1, 3), (0, 0)]
    assert pruning.ink_cells(second, 2, 4).tolist() == [[False] * 4, [False, False, True, False]]
    assert pruning.shares([first, second], masks) == {"points": 4 / 6, "ink": 3 / 5}
    first.points["out"] = (40.0, -3.0)
    assert pruning.point_cells(first, 2, 4)[-1] == (0, 3)


def test_what_is_left_after_the_last_stage_is_measured():
    found = problems.load_problems(DATA, limit=2)
    (engine,) = pruning.make_engines(None, 1)
    for method in ("divprune", "fastv", "pyramiddrop"):
        config = pruning.config_for(method, 0.25, 0)
        masks = pruning.kept_masks(pruning.with_pruning(engine, config), found)
        assert [(mask.shape, int(mask.sum())) for mask in masks] == [((9, 9), 20), ((9, 12), 27)]


def test_a_cell_has_an_error_where_seeds_differ():
    assert pruning._cell([0.5, 0.5, 0.5]) == "50.0"
    assert pruning._cell([0.2, 0.4, 0.6]) == "40.0 ± 11.5"  # 0.2 / sqrt(3)


def test_the_table_of_kept_points(tmp_path, monkeypatch, capsys):
    """At keep 1 everything is kept; strided does not depend on the weights, and the sheet is written."""
    monkeypatch.setenv("COLUMNS", "120")
    page = tmp_path / "page.png"
    arguments = [str(DATA), "--limit", "2", "--seeds", "2", "--keep", "0.5", "1", "--out", str(page)]
    pruning.main(arguments)
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines if cells}
    assert rows["random, expected"] == ["50.0", "100.0", "50.0", "100.0"]
    assert all(rows[method][1::2] == ["100.0", "100.0"] for method in pruning.METHODS)
    assert "±" in rows["random"][0]
    masks = [np.zeros((9, 9), bool), np.zeros((9, 12), bool)]
    for mask in masks:
        kept = (mask.size + 1) // 2
        mask.flat[[(2 * i + 1) * mask.size // (2 * kept) for i in range(kept)]] = True
    expected = pruning.shares(problems.load_problems(DATA, limit=2), masks)
    assert rows["strided"][::2] == [f"{100 * expected[what]:.1f}" for what in ("points", "ink")]
    assert page.stat().st_size > 10_000
