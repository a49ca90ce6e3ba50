"""Advantages of samples over their groups, in float64."""

from __future__ import annotations

import torch


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    weights: torch.Tensor | None,
    ddof: int,
    eps: float,
    scorable: torch.Tensor | None,
) -> torch.Tensor:
    """See `foveate.kernels.policy_loss.group_advantage`; arguments are checked there."""
    totals = _totals(rewards.detach().double(), weights)  # [N]
    sizes = group_offsets.diff().long()
    groups = torch.arange(sizes.numel(), device=sizes.device).repeat_interleave(sizes)  # [N]
    scorable = torch.ones_like(totals, dtype=torch.bool) if scorable is None else scorable
    members, values, owner = scorable.nonzero()[:, 0], totals[scorable], groups[scorable]

    def per_group(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(sizes.numel(), dtype=torch.float64, device=x.device).index_add_(0, owner, x)

    count = per_group(torch.ones_like(values))
    mean = per_group(values) / count
    centred = values - mean[owner]
    std = (per_group(centred.square()) / (count - ddof).clamp(min=1)).sqrt()
    advantage = centred / (std + eps)[owner]
    # The mean of equal totals can round, and its error over eps would look like an advantage. Also where one is alone.
    low = torch.full_like(mean, torch.inf).scatter_reduce_(0, owner, values, "amin")
    high = torch.full_like(mean, -torch.inf).scatter_reduce_(0, owner, values, "amax")
    nothing = low == high
    broken = per_group((~values.isfinite()).double()) > 0
    advantage = advantage.masked_fill(nothing[owner], 0.0).masked_fill(broken[owner], torch.nan)
    return torch.zeros_like(totals).index_copy_(0, members, advantage).float()


def _totals(rewards: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """float64 [N]; part by part, so that equal rows give equal sums wherever they stand."""
    if rewards.dim() == 1:
        return rewards
    total = rewards.new_zeros(rewards.shape[0])
    for k in range(rewards.shape[1]):
        total = total + (rewards[:, k] if weights is None else weights[k].double() * rewards[:, k])
    return total
