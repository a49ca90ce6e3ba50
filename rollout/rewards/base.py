"""What a reward is, and the weighted sum of several with its unscorable state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foveate.rollout.checks import require, shown
from foveate.rollout.types import Request, RolloutGroup

# An errored or aborted completion was cut short from outside: no reward of it describes the policy.
UNSCORABLE_REASONS = ("error", "abort")


class Reward(Protocol):
    """Scores the rollouts of one group: one float per rollout, None where it cannot be scored.

    A reward may also define `applies(group) -> bool`; where that is False it has no part in the group; and
    `check(request)`, which raises ValueError for a request whose metadata it cannot read, before anything runs.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, group: RolloutGroup) -> list[float | None]: ...


@dataclass(frozen=True)
class RewardTable:
    """The rewards of one group, by rollout.

    parts: name of each reward that applies -> one unweighted value per rollout. totals: the weighted sums.
    None marks a value that could not be had; it must leave the group's baseline and is never a 0.
    """

    parts: dict[str, list[float | None]]
    totals: list[float | None]


@dataclass(frozen=True)
class WeightedReward:
    """Weighted sum of rewards: total_i = sum_k weights[name_k] * part_k,i over the rewards that apply.

    A rollout's total is None if one of its parts with a non-zero weight is None, if no reward applies, or
    if it ended with "error" or "abort". A reward that does not apply adds 0 and has no entry in the parts.
    A part of weight 0 is measured and reported like the others: a judge that shall not be asked is left out.
    Values may be numbers of any kind (numpy's, tensors of one element); the table has floats. What a reward raises
    gets a note with its name and the request's. Raises ValueError unless names are unique and `weights` has exactly
    these names.
    """

    rewards: Sequence[Reward]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        names = [reward.name for reward in self.rewards]
        require(len(set(names)) == len(names), "rewards with different names", names, "rewards")
        require(set(names) == set(self.weights), f"weights for {sorted(names)}", sorted(self.weights), "weights")

    def __call__(self, group: RolloutGroup) -> RewardTable:
        """The parts and totals of one group."""
        scorable = [rollout.finish_reason not in UNSCORABLE_REASONS for rollout in group.rollouts]
        parts: dict[str, list[float | None]] = {}
        for reward in self.rewards:
            applies = getattr(reward, "applies", None)
            if applies is not None and not applies(group):
                continue
            where = f"reward {reward.name!r} of request {group.request_id!r}"
            try:
                values = numbers(reward(group), where)
            except Exception as error:
                error.add_note(f"raised by {where}")
                raise
            require(len(values) == len(scorable), f"{len(scorable)} values", len(values), where)
            parts[reward.name] = [value if ok else None for value, ok in zip(values, scorable, strict=True)]
        return RewardTable(parts, [self._total(parts, i) for i in range(len(scorable))])

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that one of the rewards could not score, naming the reward."""
        for reward in self.rewards:
            check = getattr(reward, "check", None)
            if check is not None:
                try:
                    check(request)
                except ValueError as error:
                    raise ValueError(f"{error}, reward {reward.name!r}") from error

    def _total(self, parts: Mapping[str, list[float | None]], index: int) -> float | None:
        total = 0.0
        for name, values in parts.items():
            value = values[index]
            if self.weights[name] == 0:
                continue
            if value is None:
                return None
            total += self.weights[name] * value
        return total if parts else None


def numbers(values: Iterable[Any], where: str) -> list[float | None]:
    """The values as floats; None stays. Raises ValueError for what is no number, naming where it came from."""
    return [None if value is None else _number(value, where) for value in values]


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text")
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a number or None, got {shown(value)} ({where})") from error
