"""Images whose grids or placeholders do not agree are refused by a message that names the request and the image."""

from __future__ import annotations

import re

import pytest
import torch

from foveate.rollout.testing import VISION_FAMILIES, special_id
from foveate.rollout.types import Request, VisionInputs

PAD = special_id("<|image_pad|>")
PATCH_DIM = 3 * 2 * 14 * 14
SIX, FOUR, TWO = (1, 4, 6), (1, 4, 4), (1, 2, 4)  # grids by their number of tokens
EXPANDED = ": token ids must have their placeholders expanded, and a token between two images"
REFUSED = {
    "one placeholder in ids": ([1, PAD], [SIX], f"expected 6 image placeholders for image 0, got 1 (prompt){EXPANDED}"),
    "no placeholder": ([1, 2], [SIX], "expected 6 image placeholders for image 0, got 0 (prompt)"),
    "too few for the second image": (
        [*[PAD] * 6, 1, *[PAD] * 3, 1, *[PAD] * 2],
        [SIX, FOUR, TWO],
        "expected 4 image placeholders for image 1, got 3 (prompt)",
    ),
    "too many for the first image": (
        [*[PAD] * 7, 1, *[PAD] * 4],
        [SIX, FOUR],
        "expected 6 image placeholders for image 0, got 7 (prompt)",
    ),
    "none for the second image": (
        [1, *[PAD] * 6],
        [SIX, FOUR],
        "expected 4 image placeholders for image 1, got 0 (prompt)",
    ),
    "more than the images": (
        [*[PAD] * 6, 1, 2, PAD],
        [SIX],
        "expected placeholders for 1 images, got more from 8 on (prompt)",
    ),
    "no image": ([1, PAD], [], "expected placeholders for 0 images, got more from 1 on (prompt)"),
    "gap": ([PAD] * 5 + [1, PAD], [SIX], "expected 6 adjacent placeholders, got a gap (image 0)"),
    "images swapped": (
        [*[PAD] * 4, 1, *[PAD] * 6],
        [SIX, FOUR],
        "expected 6 adjacent placeholders, got a gap (image 0)",
    ),
    "no gap": ([PAD] * 8, [SIX, TWO], "expected a token between two images, got none before image 1 (prompt)"),
    "odd width": (
        [PAD],
        [(1, 4, 3)],
        "expected positive patch counts, height and width multiples of 2, got [1, 4, 3] (image_grid_thw of image 0)",
    ),
    "odd height": ([PAD], [TWO, (1, 5, 4)], "got [1, 5, 4] (image_grid_thw of image 1)"),
    "zero": ([PAD], [TWO, SIX, (0, 4, 4)], "got [0, 4, 4] (image_grid_thw of image 2)"),
    "negative": ([PAD], [(1, -2, -2)], "got [1, -2, -2] (image_grid_thw of image 0)"),
    "flat grid": ([PAD], (1, 2, 2), "expected int [images, 3], got int64 [3] (image_grid_thw)"),
}


@pytest.fixture(scope="module")
def engines():
    return {}


@pytest.mark.parametrize(("ids", "grids", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_refused(family, ids, grids, message, engines, make_engine):
    engine = engines.get(family) or engines.setdefault(family, make_engine(family))
    grid = torch.tensor(grids, dtype=torch.int64).reshape(-1 if grids == (1, 2, 2) else (len(grids), 3))
    pixels = torch.zeros(int(grid.prod(-1).abs().sum()), PATCH_DIM)
    request = Request(ids, vision=VisionInputs(pixels, grid), request_id="mine")
    with pytest.raises(ValueError, match=f"^{re.escape('request ' + repr('mine'))}.*{re.escape(message)}"):
        engine.add_request(request)
    assert not engine.has_unfinished
