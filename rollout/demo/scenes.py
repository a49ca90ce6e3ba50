"""Scenes of one to four scanned digits, the questions asked about them, and what is true of them.

The digits are the 1,797 real scans of 8 x 8 pixels that scikit-learn carries (UCI "Optical Recognition of Handwritten
Digits"). Each scan belongs to one split, so that no scan of a held-out scene was ever seen in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from foveate.rollout.checks import require

CANVAS = 56  # pixels
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
SPLITS = {"train": 1250, "stopping": 150, "held-out": 397}  # source scans
DIGIT_PIXELS = (20, 26)  # smallest and largest side of a drawn digit
COUNT_SHARES = (0.3, 0.3, 0.25, 0.15)  # of scenes with 1, 2, 3, 4 digits

QUESTIONS = {
    "sum": "sum of digits ?",
    "largest": "largest digit ?",
    "count": "number of digits ?",
    "top-left": "digit at top-left ?",
}
QUESTION_SHARES = (1 / 8, 3 / 8, 1 / 8, 3 / 8)  # in the order of QUESTIONS


@dataclass(frozen=True, eq=False)
class Scene:
    """One image with its question.

    image: RGB, CANVAS x CANVAS. digits: (place, digit) in the order of PLACES. sources: which scan each digit is.
    kind: a key of QUESTIONS.
    """

    image: Image.Image
    digits: tuple[tuple[str, int], ...]
    sources: tuple[int, ...]
    kind: str

    @property
    def question(self) -> str:
        return QUESTIONS[self.kind]

    @property
    def answer(self) -> str:
        values = [digit for _, digit in self.digits]
        if self.kind == "sum":
            return str(sum(values))
        if self.kind == "largest":
            return str(max(values))
        return str(len(values)) if self.kind == "count" else str(dict(self.digits)[self.kind])

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What the image shows, as (subject, value): the annotations of the perception reward."""
        return tuple((place, str(digit)) for place, digit in self.digits)

    @property
    def target(self) -> str:
        """The reply that is right in every part."""
        seen = " , ".join(f"{place} {digit}" for place, digit in self.digits)
        return f"<think> {seen} </think> <answer> \\boxed{{ {self.answer} }} </answer>"


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8], 0 ground and 255 stroke; int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), data.target


@cache
def split_sources(split: str) -> tuple[int, ...]:
    """The scans of a split, as indices into scikit-learn's data set; always the same ones."""
    require(split in SPLITS, f"one of {sorted(SPLITS)}", split, "split")
    order = np.random.default_rng(0).permutation(len(_scans()[0]))
    names = list(SPLITS)
    start = sum(SPLITS[name] for name in names[: names.index(split)])
    return tuple(order[start : start + SPLITS[split]].tolist())


def scene_stream(split: str, seed: int) -> Iterator[Scene]:
    """Endless scenes of a split, determined by the seed."""
    random = np.random.default_rng([list(SPLITS).index(split), seed])
    sources = split_sources(split)
    while True:
        yield _draw(random, sources)


def _draw(random: np.random.Generator, sources: tuple[int, ...]) -> Scene:
    images, labels = _scans()
    kind = str(random.choice(list(QUESTIONS), p=QUESTION_SHARES))
    count = int(random.choice(4, p=COUNT_SHARES)) + 1
    places = set(random.permutation(4)[:count].tolist())
    if kind == "top-left" and 0 not in places:
        places = {0, *sorted(places)[1:]}
    chosen = random.choice(sources, size=count, replace=False).tolist()
    canvas = Image.new("L", (CANVAS, CANVAS))
    for place, source in zip(sorted(places), chosen, strict=True):
        _put(canvas, images[source], place, random)
    digits = tuple((PLACES[p], int(labels[s])) for p, s in zip(sorted(places), chosen, strict=True))
    return Scene(canvas.convert("RGB"), digits, tuple(chosen), kind)


def _put(canvas: Image.Image, scan: np.ndarray, place: int, random: np.random.Generator) -> None:
    """Draws a scan somewhere inside its place, at a random size."""
    side = int(random.integers(DIGIT_PIXELS[0], DIGIT_PIXELS[1] + 1))
    half = CANVAS // 2
    left, top = random.integers(0, half - side + 1, size=2).tolist()
    digit = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(digit, (place % 2 * half + left, place // 2 * half + top))
