"""Advantages of samples over their groups and over the batch, in float64; the order of every sum is the kernels'."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Partial sums of a group, and of the groups of a batch; csrc/policy_loss.cuh has the same.
GROUP_LANES, BATCH_LANES = 32, 128


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    kind: str,
    weights: torch.Tensor | None,
    ddof: int,
    eps: float,
    scorable: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """See `foveate.kernels.policy_loss.group_advantage`; rewards: [N, R]; arguments are checked there."""
    parts = rewards.detach().double()
    used = torch.ones(len(parts), dtype=torch.bool, device=parts.device) if scorable is None else scorable
    groups = _groups_of(group_offsets, used)
    values = _values(parts, groups, kind, weights, ddof, eps)
    broken = groups.any(~values.isfinite())[groups.owner]
    if kind in ("reinforce++", "reinforce++_baseline", "gdpo"):
        counted = used & ~broken
        if kind != "reinforce++":
            counted = counted & (groups.members() >= 2)[groups.owner]
        times = torch.ones_like(values) if lengths is None else lengths.clamp(min=0).double()
        zero_mean = kind != "reinforce++" and lengths is None
        values = _whitened(values, groups._replace(used=counted), times, zero_mean, ddof, eps)
    return values.masked_fill(broken, torch.nan).masked_fill(~used, 0.0).float()


class _Groups(NamedTuple):
    """Entries of some groups: group and place in it, int64 [n]; entries that are not `used` (bool [n]) do not count.

    A sum over a group adds the entry at place p to partial sum p mod lanes, in ascending order, and then the partial
    sums from the first to the last.
    """

    owner: torch.Tensor
    place: torch.Tensor
    used: torch.Tensor
    num_groups: int
    lanes: int

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """float64 [num_groups]."""
        slots = self.owner * self.lanes + self.place % self.lanes
        partial = x.new_zeros(self.num_groups * self.lanes).index_add_(0, slots, x.masked_fill(~self.used, 0.0))
        total = x.new_zeros(self.num_groups)
        for lane in partial.view(self.num_groups, self.lanes).unbind(1):
            total = total + lane
        return total

    def members(self) -> torch.Tensor:
        """float64 [num_groups]."""
        return self.sum(self.used.double())

    def any(self, x: torch.Tensor) -> torch.Tensor:
        """bool [num_groups]."""
        return self.sum((x & self.used).double()) > 0

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """bool [num_groups]: whether all used entries are one finite number."""
        low, high = (x.new_full((self.num_groups,), end) for end in (torch.inf, -torch.inf))
        low.scatter_reduce_(0, self.owner, x.masked_fill(~self.used, torch.inf), "amin")
        high.scatter_reduce_(0, self.owner, x.masked_fill(~self.used, -torch.inf), "amax")
        return (low == high) & low.isfinite()

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """x - mean. The mean of equal numbers can round, and what is left, over eps, would look like an advantage."""
        mean = self.sum(x) / self.members()
        return (x - mean[self.owner]).masked_fill(self.flat(x)[self.owner], 0.0)

    def normalised(self, x: torch.Tensor, ddof: int, eps: float) -> torch.Tensor:
        """(x - mean) / (std + eps), and 0 where all are equal."""
        centred = self.centred(x)
        std = (self.sum(centred.square()) / (self.members() - ddof)).sqrt()
        return (centred / (std + eps)[self.owner]).masked_fill(self.flat(x)[self.owner], 0.0)


def _groups_of(group_offsets: torch.Tensor, used: torch.Tensor) -> _Groups:
    count, samples = group_offsets.numel() - 1, torch.arange(used.numel(), dtype=torch.int32, device=used.device)
    owner = torch.searchsorted(group_offsets[1:], samples, right=True).clamp(max=max(0, count - 1))
    return _Groups(owner, samples - group_offsets[owner], used, count, GROUP_LANES)


def _values(
    parts: torch.Tensor, groups: _Groups, kind: str, weights: torch.Tensor | None, ddof: int, eps: float
) -> torch.Tensor:
    """float64 [N]: the advantages or, of a kind that whitens, what it whitens."""
    columns = parts.unbind(1)
    if kind == "gdpo":
        return _combined([groups.normalised(column, ddof, eps) for column in columns], parts, weights)
    total = _combined(columns, parts, weights)
    if kind == "reinforce++":
        return total
    if kind == "grpo":
        return groups.normalised(total, ddof, eps)
    if kind == "rloo":
        members = groups.members()
        return groups.centred(total) * (members / (members - 1).clamp(min=1))[groups.owner]
    return groups.centred(total)  # "dr_grpo", and "reinforce++_baseline"


def _combined(columns, parts: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """sum_k weights_k column_k, column by column, so that equal rows give equal sums wherever they stand."""
    total = parts.new_zeros(len(parts))
    for k, column in enumerate(columns):
        total = total + (column if weights is None else weights[k].double() * column)
    return total


def _whitened(
    x: torch.Tensor, groups: _Groups, times: torch.Tensor, zero_mean: bool, ddof: int, eps: float
) -> torch.Tensor:
    """(x - mean) / (std + eps) over the groups' used entries, each counted so many times; others are 0.

    The squares about a group's mean, then those of the means about the batch's: no difference of large sums.
    """
    present = groups._replace(used=groups.used & (times > 0))
    mass, total = present.sum(times), present.sum(times * x)  # [G]
    mean = total / mass
    squares = present.sum(times * (x - mean[groups.owner]).square())
    places = torch.arange(groups.num_groups, device=x.device)
    batch = _Groups(torch.zeros_like(places), places, mass > 0, 1, BATCH_LANES)
    batch_mass = batch.sum(mass)
    batch_mean = torch.zeros_like(batch_mass) if zero_mean else batch.sum(total) / batch_mass
    batch_squares = batch.sum(squares + mass * (mean - batch_mean).square())
    std = (batch_squares / (batch_mass - ddof)).sqrt()
    everything = present._replace(owner=torch.zeros_like(groups.owner), num_groups=1)
    nothing = everything.flat(x) | (batch_mass == 0)
    return ((x - batch_mean) / (std + eps)).masked_fill(nothing | ~groups.used, 0.0)
