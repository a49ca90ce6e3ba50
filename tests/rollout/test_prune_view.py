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
        frames = {0: None, 1: prune_view.KEPT, 2: prune_view.MERGED}
        assert (corner == frames[int(marks[row, column])]) is (int(marks[row, column]) > 0)


def test_a_sheet_has_a_column_for_each_site(engine, pictures):
    """Seven pictures a row, five of them side by side: the image, visionzip, fastv's site, pyramiddrop's two, ..."""
    configs = [PruneConfig("visionzip"), PruneConfig("fastv", layer=1), PruneConfig("pyramiddrop", layers=(1, 2))]
    narrow, wide = draw(engine, pictures, "Where?", configs[:1]), draw(engine, pictures, "Where?", configs)
    step = prune_view.WIDTH + prune_view.GAP
    assert (narrow.width, wide.width) == (prune_view.GAP + 2 * step, prune_view.GAP + 5 * step)
    assert wide.height == narrow.height
    more = draw(engine, pictures, "Where?", [*configs, PruneConfig("strided")])
    assert (more.width, more.height) == (wide.width, 2 * narrow.height)


def test_the_command(tmp_path, processor, pictures, capsys):
    for part in (tiny_model("qwen2_5_vl", num_hidden_layers=3), *vars(processor).values()):
        part.save_pretrained(tmp_path / "model")
    pictures[0].save(tmp_path / "wide.png")
    words = ["prune-view", "--model", str(tmp_path / "model"), "--images", str(tmp_path / "wide.png")]
    words += ["--output", str(tmp_path / "view.png")]
    assert cli.main([*words, "--methods", "strided", "fastv", "--keep", "0.25"]) == 0
    assert "1 images by 2 methods" in capsys.readouterr().out
    assert Image.open(tmp_path / "view.png").width == prune_view.GAP + 3 * (prune_view.WIDTH + prune_view.GAP)
    assert cli.main([*words, "--images", str(tmp_path / "none.png")]) == 1
    assert "expected an image file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--methods", "vscan"])
    assert "some of random" in " ".join(capsys.readouterr().err.split())
    assert torch.is_grad_enabled()
