"""Rewards to advantages."""

from __future__ import annotations

from itertools import pairwise

import torch

from foveate.kernels.dispatch import choose, require
from foveate.kernels.policy_loss import reference
from foveate.kernels.policy_loss.arguments import kind_of

KINDS = ("grpo",)


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    kind: str = "grpo",
    weights: torch.Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
    scorable: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Advantage of each sample over its group, float32 [N]: A_i = (r_i - mean) / (std + eps).

    Mean and std run in float64 over the scorable members of i's group; std divides by (members - ddof). A member
    that is not scorable gets 0 and its reward is not read; so does a group with fewer than two scorable members. A
    group whose rewards are all equal gets exactly 0: rounding of the mean, divided by eps, would otherwise look like
    an advantage. A scorable reward that is NaN or infinite gives NaN to all scorable members of its group.

    rewards: float [N], or [N, R] for R parts whose sum r = sum_k weights_k part_k is scored. group_offsets: int32
    [G + 1], samples of group g are group_offsets[g] to group_offsets[g + 1] - 1; a group may be empty. weights: float
    [R], None is all ones. scorable: bool [N], None is all. Differentiable by nothing. Raises ValueError on shapes,
    dtypes, offsets that do not run from 0 to N, and kinds other than "grpo".
    Source: GRPO (arXiv 2402.03300), with the Bessel-corrected std of its public implementations.
    """
    choose("policy_loss", backend, rewards.device)
    require(kind in KINDS, f"one of {KINDS}", kind, "kind")
    require(ddof in (0, 1), "0 or 1", ddof, "ddof")
    require(eps >= 0, "a number >= 0", eps, "eps")
    require(rewards.is_floating_point() and rewards.dim() in (1, 2), "float [N] or [N, R]", kind_of(rewards), "rewards")
    parts = rewards.shape[1] if rewards.dim() == 2 else 0
    if weights is not None:
        require(
            weights.is_floating_point() and weights.shape == (parts,), f"float [{parts}]", kind_of(weights), "weights"
        )
    count = rewards.shape[0]
    if scorable is not None:
        good = scorable.dtype == torch.bool and scorable.shape == (count,)
        require(good, f"bool [{count}]", kind_of(scorable), "scorable")
    _check_offsets(group_offsets, count)
    return reference.group_advantage(rewards, group_offsets, weights, ddof, eps, scorable)


def _check_offsets(group_offsets: torch.Tensor, count: int) -> None:
    good = group_offsets.dtype == torch.int32 and group_offsets.dim() == 1 and group_offsets.numel() >= 1
    require(good, "int32 [G + 1]", kind_of(group_offsets), "group_offsets")
    values = group_offsets.tolist()
    rising = all(a <= b for a, b in pairwise(values))
    require(values[0] == 0 and values[-1] == count and rising, f"ascending from 0 to {count}", values, "group_offsets")
