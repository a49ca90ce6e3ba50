"""Rewards to group advantages, hidden states to log-probabilities of given tokens, and both to a loss and its gradient.

Nothing writes a `[tokens, vocabulary]` tensor: logits live for a tile or a chunk of tokens. A loss has its gradients
from the same pass where a token's follows from its own log-prob; else logits are computed again.

Contracts and checks: `advantage`, `logprobs`, `loss`, `options`, `kl`. Definitions in plain torch: `reference`. Triton,
launchers first, then kernels: `triton_kernel`, `triton_tiles` (log-probs), `triton_logits` (log-probs and gradients in
one pass, with torch's products), `triton_loss`, `triton_terms` (the loss, from log-probs); `triton_products`: torch's
matrix products for all of them. C++ and CUDA have `group_advantage` alone: csrc/policy_loss.cuh.
"""

from foveate.kernels.policy_loss.advantage import ADVANTAGE_KINDS, group_advantage
from foveate.kernels.policy_loss.kl import kl_estimate, kl_in_reward, sequence_sums
from foveate.kernels.policy_loss.logprobs import IGNORE, LinearLogprobs, linear_logprobs
from foveate.kernels.policy_loss.loss import (
    PolicyLoss,
    add_metrics,
    linear_policy_loss,
    logprob_policy_loss,
    loss_denominator,
    mean_metrics,
)
from foveate.kernels.policy_loss.options import KINDS, PolicyLossOptions

__all__ = [
    "ADVANTAGE_KINDS",
    "IGNORE",
    "KINDS",
    "LinearLogprobs",
    "PolicyLoss",
    "PolicyLossOptions",
    "add_metrics",
    "group_advantage",
    "kl_estimate",
    "kl_in_reward",
    "linear_logprobs",
    "linear_policy_loss",
    "logprob_policy_loss",
    "loss_denominator",
    "mean_metrics",
    "sequence_sums",
]
