"""The picture of what pruning keeps: right patches bright, and a command that says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.rollout import cli
from foveate.rollout.config import PruneConfig
from foveate.rollout.testing import tiny_model
from foveate.rollout.tools import prune_view
from foveate.rollout.tools.prune_view import draw, kept_patches, overlay, plan_for, sites_of


@pytest.fixture
def engine(make_engine):
    return make_engine(tiny_model("qwen2_5_vl", num_hidden_layers=3), kv_memory=1 << 23)


@pytest.fixture
def pictures(picture) -> list[Image.Image]:
    """Wide and tall, of 6 x 2 and 3 x 5 tokens, in light colours."""
    return [Image.fromarray(128 + picture(*size) // 2) for size in ((56, 168), (140, 84))]


def brightness(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """Mean of each cell without the frame around it."""
    grey = np.asarray(image.convert("L"), dtype=float)
    cells = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            top, bottom = (image.height * at // rows for at in (row, row + 1))
            left, right = (image.width * at // columns for at in (column, column + 1))
            cells[row, column] = grey[top + 2 : bottom - 2, left + 2 : right - 2].mean()
    return cells


@pytest.mark.parametrize("method", ["random", "visionzip", "fastv"])
def test_kept_patches_are_bright(method, engine, pictures):
    group = plan_for(engine, pictures, "Where?", PruneConfig(method, 0.4))
    for site in sites_of(group):
        for index, (rows, columns) in enumerate(((2, 6), (5, 3))):
            start, stop = site.kept_offsets[index : index + 2].tolist()
            marks = kept_patches(group, site, index)
            assert marks.flatten().nonzero().flatten().tolist() == site.kept[start:stop].tolist()
            bright = brightness(overlay(pictures[index], group, site, index), rows, columns) > 120
            assert bright.tolist() == (marks > 0).tolist()


def test_frames_tell_what_absorbed_others(engine, pictures):
    group = plan_for(engine, pictures, "Where?", PruneConfig("visionzip", 0.5, dominant=0.5))
    (site,) = sites_of(group)
    marks = kept_patches(group, site, 0)
    assert set(marks.flatten().tolist()) == {0, 1, 2}
    shown = overlay(pictures[0], group, site, 0)
    for row, column in np.ndindex(2, 6):
        corner = shown.getpixel((shown.width * column // 6, shown.height * row // 2))
        assert (corner == prune_view.MERGED) is (int(marks[row, column]) == 2)


def test_a_line_runs_where_something_was_dropped(engine, pictures):
    """Between kept patches the picture is untouched; at the picture's own edges the line closes."""
    group = plan_for(engine, pictures, "Where?", PruneConfig("random", 0.5))
    (site,) = sites_of(group)
    marks = kept_patches(group, site, 0)
    shown = overlay(pictures[0], group, site, 0)
    seen = set()
    for row, column in np.ndindex(2, 6):
        middle = shown.getpixel((shown.width * column // 6, shown.height * (2 * row + 1) // 4))  # of its left edge
        beside = bool(marks[row, column - 1]) if column else None
        line = bool(marks[row, column]) and not beside
        assert (middle == prune_view.KEPT) is line
        seen.add((bool(marks[row, column]), beside))
    assert {(True, True), (True, False), (False, True), (False, False)} <= seen


@pytest.mark.parametrize(
    ("size", "shown"), [((1200, 80), (340, 23)), ((60, 1200), (26, 510)), ((10, 10), (340, 340)), ((4, 700), (3, 510))]
)
def test_pictures_of_any_shape_fit_the_sheet(size, shown):
    assert prune_view._sized(Image.new("L", size)).size == shown


def test_a_sheet_has_a_column_for_each_site(engine, pictures):
    """Seven pictures a row, five of them side by side: the image, visionzip, fastv's site, pyramiddrop's two, ..."""
    configs = [PruneConfig("visionzip"), PruneConfig("fastv", layer=1), PruneConfig("pyramiddrop", layers=(1, 2))]
    narrow, wide = draw(engine, pictures, "Where?", configs[:1]), draw(engine, pictures, "Where?", configs)
    step = prune_view.WIDTH + prune_view.GAP
    assert (narrow.width, wide.width) == (prune_view.GAP + 2 * step, prune_view.GAP + 5 * step)
    assert wide.height == narrow.height
    more = draw(engine, pictures, "Where?", [*configs, PruneConfig("strided")])
    assert (more.width, more.height) == (wide.width, 2 * narrow.height)


@pytest.fixture
def words(tmp_path, processor, pictures) -> list[str]:
    """A command line for a saved model and a wide picture, without methods."""
    for part in (tiny_model("qwen2_5_vl", num_hidden_layers=3), *vars(processor).values()):
        part.save_pretrained(tmp_path / "model")
    pictures[0].save(tmp_path / "wide.png")
    words = ["prune-view", "--model", str(tmp_path / "model"), "--images", str(tmp_path / "wide.png")]
    return [*words, "--output", str(tmp_path / "new" / "view.png")]


def test_the_command(words, tmp_path, capsys):
    assert cli.main([*words, "--methods", "strided", "fastv", "--keep", "0.25", "--layers", "1"]) == 0
    assert "1 image, 2 methods" in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "view.png").width == prune_view.GAP + 3 * (prune_view.WIDTH + prune_view.GAP)
    assert cli.main([*words, "--methods", "pyramiddrop", "--layers", "1", "2"]) == 0
    assert cli.main([*words, "--methods", "pyramiddrop"]) == 1
    assert "pyramiddrop: expected a decoder of at least 4 layers" in capsys.readouterr().err
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--methods", "vscan"), "some of random"),
        (("--keep", "0"), "0 < keep <= 1"),
        (("--methods", "fastv", "--layers", "1", "2"), "one layer for fastv"),
        (("--methods", "pyramiddrop", "--layers", "2", "1"), "ascending ints"),
        (("--output", "view.jpg"), "ends with .png"),
    ],
)
def test_values_that_make_no_sense_end_before_a_model_is_loaded(extra, told, capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune-view", "--model", "none", "--images", "none.png", *extra])
    assert told in " ".join(capsys.readouterr().err.split())


def test_an_image_that_is_none_ends_before_a_model_is_loaded(tmp_path, capsys):
    words = ["--model", "none", "--images", str(tmp_path / "none.png"), "--output", str(tmp_path / "view.png")]
    assert cli.main(["prune-view", *words]) == 1
    assert "expected an image file" in capsys.readouterr().err
