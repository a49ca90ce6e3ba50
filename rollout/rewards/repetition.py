"""The repetition penalty over n-grams of words."""

from __future__ import annotations

from foveate.rollout.checks import require
from foveate.rollout.types import RolloutGroup


def repeated_share(text: str, n: int = 20) -> float:
    """Share of the text's word n-grams that are repeats: 1 - |unique| / |all|, in [0, 1).

    Words are lower-cased and split at white space; a text of fewer than n words has none: 0. Source: the
    n-gram penalty of Perception-R1 (arXiv 2506.07218), n = 20.
    """
    words = text.lower().split()
    # Ids instead of words: hashing an n-gram must not cost its characters.
    ids: dict[str, int] = {}
    codes = [ids.setdefault(word, len(ids)) for word in words]
    total = len(codes) - n + 1
    if total <= 0:
        return 0.0
    return 1.0 - len({tuple(codes[i : i + n]) for i in range(total)}) / total


class Repetition:
    """The share of repeated n-grams of each rollout's text (`repeated_share`); never unscorable."""

    name = "repetition"

    def __init__(self, n: int = 20) -> None:
        require(n >= 1, "n >= 1 words", n, "n")
        self.n = n

    def __call__(self, group: RolloutGroup) -> list[float | None]:
        return [repeated_share(rollout.text, self.n) for rollout in group.rollouts]
