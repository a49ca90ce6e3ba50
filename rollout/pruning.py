"""How vision tokens are pruned: the method, its share and its options; `foveate.rollout.pruners` does the work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from foveate.rollout.checks import is_int, is_number, plain_scalars, require

# Method -> its options and their defaults; a name that is no key of this table is refused.
ENCODER_METHODS: dict[str, dict[str, Any]] = {
    "random": {"seed": 0},
    "strided": {},
    "visionzip": {"dominant": 0.84375},  # 54 of the authors' 64 tokens
    "divprune": {},
}
LAYER_METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 2},
    "pyramiddrop": {"layers": None, "ratios": None},
}
METHODS = {**ENCODER_METHODS, **LAYER_METHODS}


@dataclass(frozen=True)
class PruneConfig:
    """Vision-token pruning: a method and the share of each image's tokens that it keeps.

    method: between the vision tower and the language model "random", "strided" (the controls), "visionzip", "divprune";
    inside the language model "fastv", "pyramiddrop". keep: in (0, 1]; an image of N tokens keeps
    `keep_count(N, keep)` = max(1, floor(keep * N + 1/2)); for pyramiddrop the share that each stage leaves of
    what the one before left.

    Options of one method are None elsewhere, and there too until a value is given. seed: of random, any int, modulo
    2^64. dominant: of visionzip, in [0, 1], share of the kept tokens that is chosen by attention; the others absorb
    what is dropped. layer: of fastv, >= 1, the first decoder layer that no longer sees the dropped tokens. layers: of
    pyramiddrop, ascending, >= 1, the same by stage; None is a quarter, a half and three quarters of the decoder.
    ratios: of pyramiddrop, shares of an image's tokens that are left from each of `layers` on, descending, instead of
    keep, keep^2, ...

    Raises ValueError for an unknown method, a value out of range and an option of another method.
    """

    method: str
    keep: float = 0.5
    seed: int | None = None
    dominant: float | None = None
    layer: int | None = None
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        plain_scalars(self)
        for name in ("layers", "ratios"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        keep = self.keep
        require(isinstance(self.method, str), "a str", self.method, "method")
        require(is_number(keep) and 0 < keep <= 1, "0 < keep <= 1", keep, "keep")
        require(self.method in METHODS, f"one of {', '.join(METHODS)}", self.method, "method")
        for name in OPTIONS - METHODS[self.method].keys():
            value = getattr(self, name)
            require(value is None, f"no {name} for {self.method}", value, name)
        self._check_options()

    def _check_options(self) -> None:
        seed, dominant, layer = self.seed, self.dominant, self.layer
        require(seed is None or is_int(seed), "an int", seed, "seed")
        in_range = dominant is None or (is_number(dominant) and 0 <= dominant <= 1)
        require(in_range, "0 <= dominant <= 1", dominant, "dominant")
        require(layer is None or (is_int(layer) and layer >= 1), "an int >= 1", layer, "layer")
        layers, ratios = self.layers, self.ratios
        whole = layers is None or (_is_tuple(layers) and all(is_int(i) and i >= 1 for i in layers))
        require(whole and _ascends(layers), "ascending ints >= 1", layers, "layers")
        shares = ratios is None or (_is_tuple(ratios) and all(is_number(r) and 0 < r <= 1 for r in ratios))
        descends = shares and (ratios is None or all(a >= b for a, b in pairwise(ratios)))
        require(descends, "descending shares in (0, 1]", ratios, "ratios")
        if ratios is not None:
            stages = 3 if layers is None else len(layers)
            require(len(ratios) == stages, f"one share for each of {stages} layers", ratios, "ratios")

    @property
    def site(self) -> str:
        """ "encoder" or "layer"."""
        return "encoder" if self.method in ENCODER_METHODS else "layer"

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, those that were not given with their defaults."""
        defaults = METHODS[self.method]
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    @property
    def config_hash(self) -> str:
        """Hex; equal for equal methods, shares and options."""
        text = repr((self.method, float(self.keep), sorted(self.options.items())))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


OPTIONS = {field.name for field in fields(PruneConfig)} - {"method", "keep"}


def _is_tuple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0


def _ascends(values: tuple[int, ...] | None) -> bool:
    return values is None or all(a < b for a, b in pairwise(values))
