"""How learning rate, weight of the KL penalty and share of pruned groups move over a run, as functions of the step."""

from __future__ import annotations

import math

from foveate.rollout.grpo import GRPOConfig


def learning_rate(config: GRPOConfig, step: int) -> float:
    """Learning rate of rollout batch `step`, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert config.max_steps is not None, config.schedule
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    left = 1 - min(1.0, done)
    factor = left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return config.learning_rate * factor


def kl_coef(config: GRPOConfig, step: int) -> float:
    """Weight of the KL penalty at rollout batch `step`, counted from 0, nats^-1.

    constant: kl_coef. grpo_d, with s = step, t = max_steps, w = kl_turn t and mid = (kl_min + kl_max) / 2: first
    mid - (mid - kl_min) s / w while s <= w, then kl_min + (kl_max - kl_min) (s - w) / (t - w): it falls before it
    rises. Source: GRPO-D of OThink-MR1 (arXiv 2503.16081v2), whose kl_turn is 0.3.
    """
    if config.kl_schedule == "constant":
        return config.kl_coef
    low, high, steps = config.kl_min, config.kl_max, config.max_steps
    assert low is not None, config
    assert high is not None, config
    assert steps is not None, config
    turn = config.kl_turn * steps
    if step <= turn:
        middle = (low + high) / 2
        return middle - (middle - low) * step / turn
    return low + (high - low) * (step - turn) / (steps - turn)


def pruned_share(config: GRPOConfig, step: int) -> float:
    """Share of groups that are rolled out pruned at rollout batch `step`, counted from 0.

    On a line from pruned_share to pruned_share_end at max_steps. Source of the use, with distorted images in place of
    pruned ones: NoisyRollout (arXiv 2504.13055).
    """
    if config.pruned_share_end is None:
        return config.pruned_share
    assert config.max_steps is not None, config
    done = min(1.0, step / config.max_steps)
    return config.pruned_share + (config.pruned_share_end - config.pruned_share) * done
