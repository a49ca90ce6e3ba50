"""The GRPO objective: its configuration, and pure functions over the flat tokens of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from foveate.rollout.config import require

# exp() of a log-ratio stays finite in float32, and a broken sample cannot fill the gradient with infinities.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class GRPOConfig:
    """How rollouts become an update.

    prompts_per_step: groups of one rollout batch. max_steps: rollout batches of the whole run; None is one pass.
    learning_rate, betas, adam_eps, weight_decay: AdamW; matrices alone decay. warmup_steps: linear, in rollout
    batches. schedule: after the warm-up, constant, or down to 0 at max_steps on a line or a cosine.
    max_grad_norm: None is off. num_updates: optimiser steps on each rollout batch, each on all of it.
    micro_batch_size: samples of one forward. micro_batch_tokens: its tokens, padding included; None is no limit.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: bounds the loss of a
    token of negative advantage A by -dual_clip A; None is off. kl_coef, kl_kind: see `kl_penalty`; the kind sets the
    value, the gradient is that of k2 for all (verl calls these "k1+", "k3+").
    aggregation: see `sample_weights`; aggregation_length: its constant. old_logprobs: "recompute" by the trainer's
    own forward before the first update, or the "engine"'s. tis_cap: see `importance_weights`; None is off, inf
    does not truncate. advantage_eps, advantage_ddof: see `foveate.kernels.policy_loss.group_advantage`.
    reward_workers: groups whose reward is computed at a time, on threads, while others decode; with more than one the
    reward must be safe to share between threads, as those of `foveate.rollout.rewards` are. 0: in the main thread, when
    all have ended, for a reward that works nowhere else. The numbers are the same.
    precision: "bf16" runs the forward under autocast, parameters and log-probs stay as they are.
    eval_every, save_every: in steps, 0 is never. log_every: of printed lines. seed: of the order of prompts and of
    the requests that bring none. progress: "rich" (needs rich), "plain", "none", or "auto": rich where it is installed
    and stderr is a terminal, else plain. tensorboard: write event files too (needs tensorboard).
    A resumed run has the same options; eval_every, save_every, log_every, progress, tensorboard, reward_workers may
    change, and max_steps where the schedule is constant: others fall to 0 there.
    """

    prompts_per_step: int = 8
    max_steps: int | None = None
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float | None = 1.0
    num_updates: int = 1
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    aggregation_length: int | None = None
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    tis_cap: float | None = None
    advantage_eps: float = 1e-6
    advantage_ddof: int = 1
    reward_workers: int = 1
    precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 1
    seed: int = 0
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "num_updates", "micro_batch_size", "log_every"):
            self._check(name, "an int >= 1", lambda v: isinstance(v, int) and v >= 1)
        for name in ("warmup_steps", "eval_every", "save_every", "reward_workers"):
            self._check(name, "an int >= 0", lambda v: isinstance(v, int) and v >= 0)
        for name in ("max_steps", "micro_batch_tokens", "aggregation_length"):
            self._check(name, "an int >= 1 or None", lambda v: v is None or (isinstance(v, int) and v >= 1))
        for name in ("learning_rate", "weight_decay", "kl_coef", "advantage_eps", "clip_high", "adam_eps"):
            self._check(name, "a number >= 0", lambda v: 0 <= v < math.inf)
        for name in ("max_grad_norm", "tis_cap"):
            self._check(name, "a number > 0 or None", lambda v: v is None or v > 0)
        self._check("betas", "two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))
        self._check("clip_low", "0 <= clip_low <= 1", lambda v: 0 <= v <= 1)
        self._check("dual_clip", "a number > 1 or None", lambda v: v is None or v > 1)
        self._check("advantage_ddof", "0 or 1", lambda v: v in (0, 1))
        self._check_choices()

    def _check_choices(self) -> None:
        choices = {
            "schedule": ("constant", "linear", "cosine"),
            "kl_kind": ("k1", "k2", "k3"),
            "aggregation": ("token", "sequence", "constant"),
            "old_logprobs": ("recompute", "engine"),
            "precision": ("no", "bf16"),
            "progress": ("auto", "rich", "plain", "none"),
        }
        for name, values in choices.items():
            self._check(name, f"one of {values}", values.__contains__)
        if self.schedule != "constant":
            self._check("max_steps", f"an int for schedule={self.schedule!r}", lambda v: v is not None)
        constant = self.aggregation == "constant"
        expected = "an int" if constant else "None"
        expected += f" for aggregation={self.aggregation!r}"
        self._check("aggregation_length", expected, lambda v: (v is not None) == constant)

    def _check(self, name: str, expected: str, holds) -> None:
        value = getattr(self, name)
        require(holds(value), expected, value, name)


class TokenTerms(NamedTuple):
    """Per token, float32 [N]: the policy loss, the KL penalty, and bool [N]: where which clip bound."""

    loss: torch.Tensor
    kl: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
    clip_dual: torch.Tensor


def token_terms(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    config: GRPOConfig,
    *,
    behaviour_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
) -> TokenTerms:
    """The clipped loss of each token, to be minimised; all arguments float32 [N], a gradient through logprobs only.

    With d = clamp(logprobs - old, +-20), rho = e^d: loss = max(-A rho, -A clamp(rho, 1 - clip_low, 1 + clip_high)),
    at most -A dual_clip where A < 0, times the truncated importance weight of behaviour_logprobs where tis_cap is on.
    clip_low marks tokens of A < 0 with rho below its bound, clip_high those of A > 0 above theirs: their gradient is
    0. clip_dual marks tokens whose loss the dual clip bounds. Sources: GRPO (arXiv 2402.03300); separate bounds: DAPO
    (2503.14476); dual clip: 1912.09729.
    """
    ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    bound = torch.zeros_like(advantages, dtype=torch.bool)
    if config.dual_clip is not None:
        ceiling = -advantages * config.dual_clip
        bound = (advantages < 0) & (loss > ceiling)
        loss = torch.where(bound, ceiling, loss)
    if config.tis_cap is not None:
        assert behaviour_logprobs is not None, config.tis_cap
        loss = loss * importance_weights(old_logprobs, behaviour_logprobs, config.tis_cap)
    kl = torch.zeros_like(loss) if ref_logprobs is None else kl_penalty(logprobs, ref_logprobs, config.kl_kind)
    low = (advantages < 0) & (ratio < 1 - config.clip_low)
    high = (advantages > 0) & (ratio > 1 + config.clip_high)
    return TokenTerms(loss, kl, low, high, bound)


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each drawn token, float32 [N], with the gradient of the true one.

    With d = clamp(logprobs - ref, +-20): value k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1. Whatever the kind, the
    gradient is d grad(logprobs), that of k2: on samples of the policy it is the only one of the three whose
    expectation is the gradient of the KL (k1's is 0, k3's is that of the forward KL). It holds on policy.
    Sources: J. Schulman, "Approximating KL divergence"; verl's straight-through "k1+", "k3+".
    """
    d = (logprobs.detach() - ref_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    value = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[kind]()
    return value + d * (logprobs - logprobs.detach())


def importance_weights(old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(e^(old - behaviour), cap), float32 [N], without gradient: token-level truncated importance sampling.

    behaviour = `rollout.logprobs - rollout.log_kept`, under which the token was really drawn. Both policies then
    are what they are: old is over the whole vocabulary, behaviour over the ids that bans and filters left, so that
    without any mismatch the weight is e^log_kept <= 1, the mass that was kept; that is the exact correction for
    drawing from the kept set. Source: Yao et al., "Your efficient RL framework secretly
    brings you off-policy training".
    """
    difference = (old_logprobs - behaviour_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp().clamp(max=cap)


def sample_weights(lengths: torch.Tensor, aggregation: str, constant: int | None = None) -> torch.Tensor:
    """Weight of each token of each sample in the batch's loss, float32 [S], from int64 [S] token counts.

    token: 1 / sum(lengths), every token alike. sequence: 1 / (S length), every sample alike. constant:
    1 / (S constant), as Dr. GRPO (arXiv 2503.20783) with the generation cap as constant. They belong to the whole
    batch: the losses of its micro-batches add up to the loss of the batch, however it is cut.
    """
    count = lengths.numel()
    sizes = lengths.double()
    if aggregation == "token":
        weights = torch.full_like(sizes, 1.0) / sizes.sum()
    elif aggregation == "sequence":
        weights = 1 / (count * sizes)
    else:
        assert constant is not None, aggregation
        weights = torch.full_like(sizes, 1 / (count * constant))
    return weights.float()


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
