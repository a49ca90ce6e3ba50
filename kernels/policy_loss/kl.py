"""KL to a reference as a part of the reward."""

from __future__ import annotations

import torch

from foveate.kernels.dispatch import require
from foveate.kernels.policy_loss.reference import loss as reference


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """k1 = d, k2 = d^2 / 2 or k3 = e^-d + d - 1 at each drawn token, [N], d = logprobs - ref_logprobs, clamped to +-20.

    The value, without gradient: what `kl_in_reward` takes. logprobs: float [N], those of the policy that drew. Source:
    J. Schulman, "Approximating KL divergence". Raises ValueError for another kind.
    """
    require(kind in ("k1", "k2", "k3"), "k1, k2 or k3", kind, "kind")
    return reference.kl_penalty(logprobs.detach(), ref_logprobs.detach(), kind, "value")


def sequence_sums(values: torch.Tensor, sequence_ids: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of values, float [N], over the tokens of each of `count` sequences, float64 [count], without gradient.

    sequence_ids: int [N] in [0, count).
    """
    total = torch.zeros(count, dtype=torch.float64, device=values.device)
    return total.index_add_(0, sequence_ids.long(), values.detach().double())


def kl_in_reward(rewards: torch.Tensor, kl: torch.Tensor, sequence_ids: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """r_s - kl_coef sum of kl over the tokens of sequence s, float [S]: KL in the reward, before advantages.

    rewards: float [S]. kl: float [N], k1 = old - ref log-probs as a rule. sequence_ids: int [N] in [0, S). Source: RLOO
    (arXiv 2402.14740).
    """
    return (rewards.double() - kl_coef * sequence_sums(kl, sequence_ids, len(rewards))).to(rewards.dtype)
