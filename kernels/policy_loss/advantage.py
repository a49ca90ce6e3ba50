"""Rewards to advantages."""

from __future__ import annotations

import torch

from foveate.kernels.dispatch import choose_among, require
from foveate.kernels.policy_loss import operators, reference
from foveate.kernels.policy_loss.arguments import kind_of

GROUP_KINDS = ("grpo", "dr_grpo", "rloo")
BATCH_KINDS = ("reinforce++", "reinforce++_baseline", "gdpo")
ADVANTAGE_KINDS = GROUP_KINDS + BATCH_KINDS
BACKENDS = ("cuda", "cpp", "reference")
DDOF, EPS = 1, 1e-6


def group_advantage(
    rewards: torch.Tensor,
    group_offsets: torch.Tensor,
    *,
    kind: str = "grpo",
    weights: torch.Tensor | None = None,
    ddof: int = DDOF,
    eps: float = EPS,
    scorable: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Advantage of each sample over its group, or over the batch, float32 [N].

    With r_i = sum_k weights_k rewards_ik, and mean and std over the scorable members of i's group:

        "grpo"                   (r_i - mean) / (std + eps)
        "dr_grpo"                r_i - mean
        "rloo"                   r_i - mean of the other members = (r_i - mean) n / (n - 1), n members
        "reinforce++"            white(r_i)
        "reinforce++_baseline"   white(r_i - mean)
        "gdpo"                   white(sum_k weights_k (rewards_ik - mean_k) / (std_k + eps)), column by column

        white(x_i) = (x_i - mean of x) / (std of x + eps) over the batch

    The batch is every scorable sample of the call; with `lengths` every token of theirs, each with the x of its
    sample, as PPO whitens returns. Both std divide by (count - ddof). The sums run in float64, squares about a mean
    that is known, in an order that depends on the sizes alone: the same bits on every backend but "reference" on a GPU.

    A member that is not scorable gets 0 and its reward is not read. Members of a group with fewer than two scorable
    ones get 0 and stay out of the batch; "reinforce++" has no group baseline and takes them like others. A group whose
    rewards are all equal gets exactly 0 where that is the formula's value (rounding of the mean, divided by eps, would
    otherwise look like an advantage): for every kind but "reinforce++", and without `lengths`; with them its x is 0,
    but the mean of x need not be. A batch whose x are all equal gets 0. A scorable reward that is NaN or infinite gives
    NaN to the scorable members of its group, which stays out of the batch.

    rewards: float [N], or [N, R] for R parts; "gdpo" takes [N, R] alone. group_offsets: int32 [G + 1] from 0 to N,
    samples of group g are group_offsets[g] to group_offsets[g + 1] - 1; a group may be empty. weights: float [R], None
    is all ones. scorable: bool [N], None is all. lengths: int32 or int64 [N], tokens of each sample, >= 0, for the
    kinds that whiten. ddof, eps: for the kinds that divide by a std. Tensors are moved to the device of `rewards`.
    Differentiable by nothing. Raises ValueError on shapes, dtypes, values and on arguments that the kind does not read.

    A GPU is not waited for, so that the values of offsets and lengths that lie there are not checked: wrong offsets
    give wrong advantages, but touch no other memory; lengths below 0 are 0.

    Source: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740), REINFORCE++ (2501.03262; without its KL
    in the reward, which differs by token), GDPO (2601.05242); std with Bessel's correction as in their public
    implementations.
    """
    chosen = choose_among(BACKENDS, "group_advantage", "policy_loss", backend, rewards.device)
    _check_kind(kind, ddof, eps, lengths)
    shaped = rewards.is_floating_point() and rewards.dim() in (1, 2)
    require(shaped, "float [N] or [N, R]", kind_of(rewards), "rewards")
    if kind == "gdpo":
        expected = "[N, R] for 'gdpo', which normalises each column of rewards by itself"
        require(rewards.dim() == 2, expected, kind_of(rewards), "rewards")
    _check_columns(rewards, weights, scorable, lengths)
    _check_offsets(group_offsets, rewards.shape[0])
    parts = rewards.detach() if rewards.dim() == 2 else rewards.detach()[:, None]
    where = parts.device
    offsets = group_offsets.contiguous().to(where, non_blocking=True)
    weights, scorable, lengths = (
        x if x is None else x.to(where, non_blocking=True) for x in (weights, scorable, lengths)
    )
    if chosen == "reference":
        return reference.group_advantage(parts, offsets, kind, weights, ddof, eps, scorable, lengths)
    return operators.group_advantage(parts, offsets, kind, weights, ddof, eps, scorable, lengths, chosen)


def _check_kind(kind: str, ddof: int, eps: float, lengths: torch.Tensor | None) -> None:
    require(kind in ADVANTAGE_KINDS, f"one of {ADVANTAGE_KINDS}", kind, "kind")
    require(ddof in (0, 1), "0 or 1", ddof, "ddof")
    require(eps >= 0, "a number >= 0", eps, "eps")
    if kind in ("dr_grpo", "rloo"):
        for value, default, argument in ((ddof, DDOF, "ddof"), (eps, EPS, "eps")):
            require(value == default, f"{default}, the default: {kind!r} divides by no std", value, argument)
    if kind in GROUP_KINDS:
        expected = f"None: {kind!r} has a baseline of samples; {BATCH_KINDS} can count tokens"
        require(lengths is None, expected, None if lengths is None else kind_of(lengths), "lengths")


def _check_columns(
    rewards: torch.Tensor, weights: torch.Tensor | None, scorable: torch.Tensor | None, lengths: torch.Tensor | None
) -> None:
    count = rewards.shape[0]
    if weights is not None:
        require(rewards.dim() == 2, "None, or rewards [N, R]", kind_of(weights), "weights")
        good = weights.is_floating_point() and weights.shape == rewards.shape[1:]
        require(good, f"float [{rewards.shape[1]}]", kind_of(weights), "weights")
    if scorable is not None:
        good = scorable.dtype == torch.bool and scorable.shape == (count,)
        require(good, f"bool [{count}]", kind_of(scorable), "scorable")
    if lengths is not None:
        good = lengths.dtype in (torch.int32, torch.int64) and lengths.shape == (count,)
        require(good, f"int32 or int64 [{count}]", kind_of(lengths), "lengths")
        if not lengths.is_cuda:
            require(bool((lengths >= 0).all()), "numbers of tokens >= 0", lengths.tolist(), "lengths")


def _check_offsets(group_offsets: torch.Tensor, count: int) -> None:
    good = group_offsets.dtype == torch.int32 and group_offsets.dim() == 1 and group_offsets.numel() >= 1
    require(good, "int32 [G + 1]", kind_of(group_offsets), "group_offsets")
    require(group_offsets.numel() > 1 or count == 0, f"groups of {count} samples", "no group", "group_offsets")
    if group_offsets.is_cuda:
        return
    rising = bool((group_offsets.diff() >= 0).all()) and group_offsets[0] == 0 and group_offsets[-1] == count
    if not rising:
        require(False, f"ascending from 0 to {count}", group_offsets.tolist(), "group_offsets")
