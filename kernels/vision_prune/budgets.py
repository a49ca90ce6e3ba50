"""How many tokens each layer keeps: counts from shares, and schedules with few levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from foveate.kernels.dispatch import require

MAX_LEVELS = 8


class NestedBudgets(NamedTuple):
    """A schedule of nested keep sets: from layers[i] on, up to layers[i + 1], the share shares[i] is kept.

    layers begins with 0 and ascends; shares descend. extra: the mean share, over all layers, that is kept beyond what
    was asked for.
    """

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    extra: float


def nested_budgets(shares: Sequence[float], *, max_levels: int = MAX_LEVELS) -> NestedBudgets:
    """The schedule of at most max_levels levels that keeps as little as possible, but in no layer less than asked for.

    shares: what each layer is to keep, from 0 to 1, never more than the layer before (a token that is dropped stays
    dropped). FastV has two levels, PyramidDrop four; P-Sigmoid (arXiv 2412.00556) one a layer, which is what there is
    to round. Neighbouring layers share a level, that of the first of them; the split is the cheapest one, found by
    dynamic programming, the earliest of equals. Raises ValueError if shares rise or leave [0, 1], or there are none.
    """
    require(len(shares) > 0, "a share a layer", list(shares), "shares")
    require(max_levels >= 1, "at least 1", max_levels, "max_levels")
    inside = all(0 <= share <= 1 for share in shares)
    falling = all(before >= after for before, after in pairwise(shares))
    require(inside and falling, "shares from 0 to 1, none above the one before", list(shares), "shares")
    layers = _cheapest_split([float(share) for share in shares], max_levels)
    ends = (*layers[1:], len(shares))
    kept = math.fsum(shares[layer] * (end - layer) for layer, end in zip(layers, ends, strict=True))
    return NestedBudgets(layers, tuple(float(shares[i]) for i in layers), (kept - math.fsum(shares)) / len(shares))


def keep_count(num_tokens: int, share: float) -> int:
    """floor(share num_tokens + 1/2), but at least 1 where both are above 0. ValueError unless 0 <= share <= 1."""
    require(num_tokens >= 0, "at least 0", num_tokens, "num_tokens")
    require(0 <= share <= 1, "from 0 to 1", share, "share")
    return max(math.floor(share * num_tokens + 0.5), int(share > 0 and num_tokens > 0))


def _cheapest_split(shares: list[float], max_levels: int) -> tuple[int, ...]:
    """First layers of the levels."""
    count = len(shares)
    starts = [i for i in range(count) if i == 0 or shares[i] < shares[i - 1]]
    # best[i]: (what layers i.. keep with so many levels, their first layers), for one level, then one more at a time.
    best: dict[int, tuple[float, tuple[int, ...]]] = {i: (shares[i] * (count - i), (i,)) for i in starts}
    for _ in range(max_levels - 1):
        best = {
            i: min(
                best[i],
                *((shares[i] * (j - i) + best[j][0], (i, *best[j][1])) for j in starts if j > i),
                key=lambda option: (option[0], len(option[1]), option[1]),
            )
            if i != starts[-1]
            else best[i]
            for i in starts
        }
    return best[0][1]
