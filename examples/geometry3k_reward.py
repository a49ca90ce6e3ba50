"""A reward of one's own, as `foveate train` loads it: `examples/geometry3k_reward.py:shortness`."""

from __future__ import annotations

from foveate import RolloutGroup


def shortness(group: RolloutGroup) -> list[float | None]:
    """1 for no tokens, falling to 0 at the most that were allowed; one value for each rollout of the group.

    None would say that a rollout cannot be scored; `group.request.metadata` holds answer, facts and metadata of the
    line in the data.
    """
    most = group.request.sampling.max_tokens
    return [1 - len(rollout.token_ids) / most for rollout in group.rollouts]
