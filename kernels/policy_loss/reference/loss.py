"""The policy losses as differentiable functions of per-token vectors: the one definition of each kind.

Everything here is flat: a token is an entry of [N], its sequence an entry of [S] found by its id. Gradients flow
through `logprobs` and `entropy` alone. Each log-ratio is clamped to +-20 before its exponential, and has no gradient
beyond: a token's difference, the mean of GSPO, the sum of a sequence-level correction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate.kernels.policy_loss.options import Formula

# exp() of a log-ratio stays finite in float32, and a broken sample cannot fill the gradient with infinities.
MAX_LOG_RATIO = 20.0


class Tokens(NamedTuple):
    """logprobs, entropy, and where given old, rollout, ref: float [N]. sequence_ids: int64 [N]. active: bool [N].

    advantages: float [S]. Entries of tokens that are not active are never read into a result.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor | None
    rollout: torch.Tensor | None
    ref: torch.Tensor | None
    sequence_ids: torch.Tensor
    active: torch.Tensor
    advantages: torch.Tensor


class Terms(NamedTuple):
    """Per token, [N]. policy: after `factor`, the mismatch correction (0: dropped). kl, entropy: as they enter.

    ratio: of the token or its sequence. clip_low, clip_high, clip_dual: bool, where that bound takes the gradient
    (or, for cispo, holds the ratio). mismatch: log-ratio of old over behaviour policy, clamped.
    """

    policy: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor
    factor: torch.Tensor
    mismatch: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
    clip_dual: torch.Tensor


class Sequences:
    """Sums over the active tokens of each sequence, in float64, in the dtype of what is summed."""

    def __init__(self, tokens: Tokens):
        self.ids, self.active, self.count = tokens.sequence_ids, tokens.active, tokens.advantages.numel()
        self.lengths = self.sum(tokens.active.to(tokens.logprobs.dtype))  # [S]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [S]."""
        kept = torch.where(self.active, values, 0.0).double()
        total = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.ids, kept).to(values.dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> [S]; 0 for a sequence without active tokens."""
        return self.sum(values) / self.lengths.clamp(min=1)


def clamp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, formula: Formula
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """max(-A min(rho, delta), -A clip(rho, 1 - low, 1 + high)), at most -A dual_clip where A < 0; and who is clipped.

    Source: PPO (arXiv 1707.06347); GRPO (2402.03300); two bounds: DAPO (2503.14476); dual clip: 1912.09729; delta:
    INTELLECT-2 (2505.07291).
    """
    clipped = ratio.clamp(formula.floor, formula.ceiling)
    loss = torch.maximum(-advantages * ratio.clamp(max=formula.delta), -advantages * clipped)
    limit = -advantages * formula.dual_clip
    dual = (advantages < 0) & (loss > limit)
    loss = torch.where(dual, limit, loss)
    low, high = (advantages < 0) & (ratio < formula.floor), (advantages > 0) & (ratio > formula.ceiling)
    return loss, low, high, dual | ((advantages < 0) & (ratio > formula.delta))


def cispo_surrogate(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, formula: Formula
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-sg(clip(rho, floor, ceiling)) A l: the clipped ratio is a weight, no token loses its gradient.

    "cispo" has bounds [1 - clip_low, 1 + clip_high], as MiniMax-M1 (arXiv 2506.13585; its experiments have no lower
    bound, clip_low = 1) and verl; "cispo_max" bounds the ratio above by clip_high itself, as ScaleRL (2510.13786) and
    TRL.
    """
    weight = ratio.detach().clamp(formula.floor, formula.ceiling)
    return -weight * advantages * logprobs, ratio < formula.floor, ratio > formula.ceiling


def sapo_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, formula: Formula) -> torch.Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A. Source: SAPO (arXiv 2511.20347)."""
    tau = torch.full_like(ratio, formula.tau_neg).masked_fill(advantages > 0, formula.tau_pos)
    return -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau) * advantages


def log_ratio(tokens: Tokens, sequences: Sequences, kind: str) -> torch.Tensor:
    """log rho of each token, [N], clamped: its own, or that of its sequence.

    "sequence": the mean of the sequence's differences; "sequence_token": the same value with the token's own gradient
    (GSPO and GSPO-token, arXiv 2507.18071). Without old log-probs the current ones, detached.
    """
    difference = tokens.logprobs - (tokens.logprobs if tokens.old is None else tokens.old).detach()
    if kind == "token":
        return clamp(difference)
    mean = sequences.mean(difference)[tokens.sequence_ids]
    if kind == "sequence_token":
        mean = mean.detach() + (tokens.logprobs - tokens.logprobs.detach())
    return clamp(mean)


def kl_penalty(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str, gradient: str = "straight_through"
) -> torch.Tensor:
    """Estimate of KL(policy || reference) at each drawn token, [N]: k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1.

    d = clamp(logprobs - ref, +-20). gradient "value": that of the estimate. "straight_through": d grad(logprobs), that
    of k2, whatever the kind: on samples of the policy the only one of the three whose expectation is the gradient of
    the KL (k1's is 0, k3's is that of the forward KL). Sources: J. Schulman, "Approximating KL divergence"; verl's
    "k1+", "k3+".
    """
    source = logprobs if gradient == "value" else logprobs.detach()
    d = clamp(source - ref_logprobs.detach())
    value = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[kind]()
    return value if gradient == "value" else value + d * (logprobs - logprobs.detach())


def mismatch_factor(mismatch: torch.Tensor, tokens: Tokens, sequences: Sequences, formula: Formula) -> torch.Tensor:
    """What the policy term of each token is multiplied by, [N], without gradient; 0 drops it.

    mismatch: the unclamped log-ratio of old over behaviour policy. Sources: TIS, Yao et al., "Your efficient RL
    framework secretly brings you off-policy training"; MIS, Liu et al., "When speed kills stability"; IcePop, Ling
    team; sequence rejection: verl's rollout correction; off-policy mask: DeepSeek-V3.2 (arXiv 2512.02556).
    """
    ids = tokens.sequence_ids
    factor = torch.ones_like(mismatch)
    if formula.correction is not None:
        whole = formula.correction.endswith("_sequence")
        weight = clamp(sequences.sum(mismatch)[ids] if whole else mismatch).exp()
        if formula.correction.startswith("tis"):
            factor = weight.clamp(max=formula.correction_high)
        else:
            outside = (weight < formula.correction_low) | (weight > formula.correction_high)
            factor = torch.where(outside, 0.0, weight)
    return torch.where(factor == 0, 0.0, factor * _kept_sequences(mismatch, tokens, sequences, formula)[ids])


def _kept_sequences(mismatch: torch.Tensor, tokens: Tokens, sequences: Sequences, formula: Formula) -> torch.Tensor:
    """1, or 0 for a sequence that is dropped, [S]; NaN where the statistic that decides is, so that it shows."""
    keep = torch.ones_like(sequences.lengths)
    if formula.rejection is not None:
        if formula.rejection == "geometric":
            statistic = clamp(sequences.mean(mismatch)).exp()
        else:
            statistic = sequences.mean(torch.expm1(clamp(mismatch)) - clamp(mismatch))
        outside = (statistic < formula.rejection_low) | (statistic > formula.rejection_high)
        keep = torch.where(outside, 0.0, 1.0 + 0.0 * statistic)
    if formula.off_policy_limit is not None:
        assert tokens.rollout is not None
        gap = sequences.mean(tokens.rollout - tokens.logprobs.detach())
        outside = (tokens.advantages < 0) & (gap > formula.off_policy_limit)
        keep = torch.where(outside, 0.0, keep + 0.0 * gap)
    return keep


def token_terms(tokens: Tokens, formula: Formula) -> Terms:
    """All terms of each token."""
    tokens = _blank_inactive(tokens)
    sequences = Sequences(tokens)
    ratio = log_ratio(tokens, sequences, formula.ratio).exp()
    advantages = tokens.advantages[tokens.sequence_ids]
    none = torch.zeros_like(tokens.active)
    low = high = dual = none
    if formula.surrogate == "clip":
        policy, low, high, dual = clipped_surrogate(ratio, advantages, formula)
    elif formula.surrogate == "sapo":
        policy = sapo_surrogate(ratio, advantages, formula)
    else:
        policy, low, high = cispo_surrogate(ratio, tokens.logprobs, advantages, formula)
    mismatch = torch.zeros_like(ratio)
    if tokens.rollout is not None:
        mismatch = (tokens.logprobs if tokens.old is None else tokens.old).detach() - tokens.rollout
    factor = mismatch_factor(mismatch, tokens, sequences, formula)
    kl = torch.zeros_like(ratio)
    if tokens.ref is not None:
        kl = kl_penalty(tokens.logprobs, tokens.ref, formula.kl_kind, formula.kl_gradient)
        kl = kl * ratio if formula.kl_ratio_weighted else kl
    # A dropped token's term is 0 even where it is not finite.
    policy = torch.where(factor == 0, 0.0, policy * factor)
    return Terms(policy, kl, tokens.entropy, ratio, factor, clamp(mismatch), low, high, dual)


def token_weights(tokens: Tokens, aggregation: str) -> torch.Tensor:
    """Weight of each token in the loss before the denominator, [N]: 1, or 1 / length of its sequence; 0 if inactive."""
    weights = tokens.active.to(tokens.logprobs.dtype)
    if aggregation != "sequence":
        return weights
    return weights / Sequences(tokens).lengths.clamp(min=1)[tokens.sequence_ids]


def policy_loss(tokens: Tokens, formula: Formula, denominator: torch.Tensor) -> tuple[torch.Tensor, Terms]:
    """sum_i w_i (policy_i + kl_coef kl_i - entropy_coef entropy_i) / denominator, and the terms. See `Terms`."""
    terms = token_terms(tokens, formula)
    value = terms.policy + formula.kl_coef * terms.kl - formula.entropy_coef * terms.entropy
    weights = token_weights(tokens, formula.aggregation)
    weighted = torch.where(tokens.active, weights * value, 0.0)
    return (weighted.double().sum() / denominator.double()).to(value.dtype), terms


# Sums over active tokens, in this order; a name that ends in "_max" is a maximum, 0 without tokens, and stands last.
METRICS = (
    "tokens",
    "clip_low",
    "clip_high",
    "clip_dual",
    "dropped",
    "ratio",
    "entropy",
    "kl",
    "correction",
    "mismatch_k1",
    "mismatch_k3",
    "mismatch_abs",
    "weight",
    "weight_squared",
    "ratio_max",
    "mismatch_abs_max",
)


def metric_sums(terms: Terms, active: torch.Tensor) -> torch.Tensor:
    """float64 [len(METRICS)]. mismatch_k1: rollout - old; weight: e^(old - rollout), before any correction."""
    weight = terms.mismatch.double().exp()
    columns = {
        "tokens": active,
        "clip_low": terms.clip_low,
        "clip_high": terms.clip_high,
        "clip_dual": terms.clip_dual,
        "dropped": terms.factor == 0,
        "ratio": terms.ratio,
        "ratio_max": terms.ratio,
        "entropy": terms.entropy,
        "kl": terms.kl,
        "correction": terms.factor,
        "mismatch_k1": -terms.mismatch,
        "mismatch_k3": torch.expm1(terms.mismatch) - terms.mismatch,
        "mismatch_abs": terms.mismatch.abs(),
        "mismatch_abs_max": terms.mismatch.abs(),
        "weight": weight,
        "weight_squared": weight.square(),
    }
    kept = {name: torch.where(active, columns[name].detach().double(), 0.0) for name in METRICS}
    zero = active.new_zeros(1, dtype=torch.float64)
    return torch.stack([torch.cat([x, zero]).max() if n.endswith("_max") else x.sum() for n, x in kept.items()])


def _blank_inactive(tokens: Tokens) -> Tokens:
    """What an inactive token holds may be anything, NaN too: zeros, and a gradient that cannot be NaN."""

    def blank(values: torch.Tensor) -> torch.Tensor:
        return torch.where(tokens.active, values, 0.0)

    old, rollout, ref = (None if x is None else blank(x) for x in (tokens.old, tokens.rollout, tokens.ref))
    return tokens._replace(
        logprobs=blank(tokens.logprobs), entropy=blank(tokens.entropy), old=old, rollout=rollout, ref=ref
    )
